#!/usr/bin/env bash
# Answer the requests of a file, greedy and sampled: examples/batch.sh [REQUESTS.jsonl [ANSWERS.jsonl]]
# Run it from the repository's root.
set -euo pipefail
source examples/environment.sh

vllm run-batch -i "${1:-examples/batch.jsonl}" -o "${2:-answers.jsonl}" \
    --model "$TARGET" --served-model-name small --enforce-eager \
    --speculative-config '{"model": "'"$HEAD"'", "num_speculative_tokens": 8}'
