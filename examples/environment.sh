# Source this from the repository's root, in bash or zsh: source examples/environment.sh
# It sets PATH, TARGET, HEAD and, with vLLM's CPU build, the settings under which vLLM is fastest.
if [ -d .venv ]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi
eval "$(python -c '
import os, shlex
from clover_vllm.base.paths import shipped_head
from clover_vllm.launch.environment import prepare

before = dict(os.environ)
prepare()
os.environ["HEAD"] = str(shipped_head())
for name, value in os.environ.items():
    if before.get(name) != value:
        print(f"export {name}={shlex.quote(value)}")
')"
TARGET="$(clover-vllm target smollm2-135m)"
export TARGET
