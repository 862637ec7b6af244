"""The patches apply to the installed vLLM, and with them nothing is hooked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import vllm
from engines import differing, run_engine, tokens_of
from pairs import llm, make_pair, random_requests, speculative

PATCHES = sorted((Path(__file__).parents[2] / "patches").glob("*.patch"))


def patched_copy(folder: Path) -> Path:
    """A copy of the installed package, made of links but for the files that the patches change."""
    package = Path(vllm.__file__).parent
    folder.mkdir()
    subprocess.run(["cp", "-rs", package, folder], check=True)
    for patch in PATCHES:
        for line in patch.read_text().splitlines():
            if line.startswith("+++ b/"):
                file = folder / line.removeprefix("+++ b/")
                if file.is_symlink():
                    source = file.resolve()
                    file.unlink()
                    shutil.copy(source, file)
        with patch.open() as diff:
            subprocess.run(
                ["patch", "-p1", "--no-backup-if-mismatch", "-F0"], cwd=folder, stdin=diff, check=True
            )
    return folder


def test_what_is_patched_needs_no_hooks(tmp_path: Path) -> None:
    assert len(PATCHES) == 5
    copy = patched_copy(tmp_path / "site")
    first = {"PYTHONPATH": os.pathsep.join([str(copy), *filter(None, [os.environ.get("PYTHONPATH")])])}
    target, head = make_pair(tmp_path, "llama tied")
    settings = llm(target, speculative_config=speculative(head), logits_processors=["processors:PerRequest"])
    requests = random_requests(12, min_p=0.1, temperature=0.8, seed=1, logit_bias={7: 3.0})
    for request in requests[6:]:
        request["params"]["extra_args"] = {"every_other": True}
    hooked = run_engine(settings, requests, check_seams=True)
    patched = run_engine(settings, requests, env=first, check_seams=True)
    assert hooked["stats"]["seams"]["replaced"] == [
        "create_speculative_config",
        "_validate_spec_decode",
        "num_lookahead_tokens",
    ]
    assert hooked["stats"]["seams"]["runner"]
    assert hooked["stats"]["seams"]["registered"] == 0
    seams = patched["stats"]["seams"]
    assert seams.pop("vllm").startswith(str(copy))
    assert seams == {"replaced": [], "runner": False, "registered": 1}
    assert patched["stats"]["worker"] == "CloverCPUWorker"
    assert differing(hooked, patched) == 0
    for sequences in tokens_of(patched)[6:]:
        assert all(token % 2 == 1 - i % 2 for i, token in enumerate(sequences[0]))
