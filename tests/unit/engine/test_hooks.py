"""What Clover touches in vLLM is checked first, and nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import vllm
from configure import configuration
from engines import run_script
from small import head_for, one_sentence, tiny_llama
from vllm.engine.arg_utils import EngineArgs
from vllm_uses import uses

from clover_vllm.base.errors import UserError
from clover_vllm.engine import hooks, plugin, seams
from clover_vllm.heads.clover2.checkpoint import save_head
from clover_vllm.heads.weights import probe_lm_head
from clover_vllm.target.frozen import FrozenTarget


def test_installed_vllm_is_as_expected() -> None:
    assert seams.differences() == []
    assert seams.complaints(vllm.__version__) == []


def test_whatever_v2_uses_of_vllm_is_listed() -> None:
    listed = {(symbol.module, symbol.name) for symbol in (*seams.HOOKS, *seams.RELIED_ON)}
    listed |= {(module, name.partition(".")[0]) for module, name in listed}
    engine = Path(hooks.__file__).parent
    files = [*(engine / "v2").glob("*.py"), engine / "backends" / "gpu.py", engine / "gpu_worker.py"]
    found = set().union(*map(uses, files))
    assert {
        ("vllm.config.model", "PROCESSED_LOGPROBS_MODES"),
        ("vllm.v1.core.sched.scheduler", "Scheduler.dynamic_sd_lookup"),
        ("vllm.v1.worker.gpu.input_batch", "InputBatch.make_dummy"),
        ("vllm.v1.worker.gpu.spec_decode.rejection_sampler", "RejectionSampler._verify"),
    } <= found
    assert found - listed == set()


@pytest.mark.parametrize(
    ("symbol", "words"),
    [
        (seams.Symbol("vllm.engine.arg_utils", "EngineArgs.gone", ("self",), ""), "does not exist"),
        (seams.Symbol("vllm.gone.module", "f", (), ""), "does not exist"),
        (seams.Symbol("vllm.v1.core.sched.scheduler", "Scheduler.gone", (), ""), "does not exist"),
        (
            seams.Symbol("vllm.engine.arg_utils", "EngineArgs.create_speculative_config", ("self", "x"), ""),
            "takes other arguments",
        ),
    ],
)
def test_changed_symbols_are_named(monkeypatch: pytest.MonkeyPatch, symbol: seams.Symbol, words: str) -> None:
    monkeypatch.setattr(seams, "HOOKS", (symbol,))
    (found,) = seams.differences()
    assert seams.complaints("0.99.1") == ["vLLM is 0.99.1", found]
    assert words in found
    assert symbol.name in found


class FakeArgs:
    """Stands for EngineArgs; the original returns what it was given."""

    def __init__(self, speculative_config: dict[str, Any] | None, **flags: Any) -> None:
        self.speculative_config = speculative_config
        self.spec_method = flags.get("spec_method")
        self.spec_model = flags.get("spec_model")
        self.spec_tokens = flags.get("spec_tokens")

    def create_speculative_config(self, target_model_config: Any, target_parallel_config: Any) -> Any:
        return ("original", target_model_config, target_parallel_config)


def fresh() -> type[FakeArgs]:
    class Args(FakeArgs):
        create_speculative_config = FakeArgs.create_speculative_config

    return Args


def test_other_methods_reach_the_original() -> None:
    args = fresh()
    hooks.install(args, [])
    for given in (None, {}, {"method": "ngram"}, {"method": "eagle", "model": "x"}):
        assert args(given).create_speculative_config(1, target_parallel_config=2) == ("original", 1, 2)


def test_installing_twice_is_harmless() -> None:
    args = fresh()
    hooks.install(args, [])
    first = args.create_speculative_config
    hooks.install(args, [])
    assert args.create_speculative_config is first


def test_unsupported_vllm_runs_untouched_and_says_so_when_asked() -> None:
    args = fresh()
    hooks.install(args, seams.complaints("0.99.1"))
    assert args({"method": "ngram"}).create_speculative_config(1, 2) == ("original", 1, 2)
    with pytest.raises(UserError) as caught:
        args({"method": "clover2", "model": "head"}).create_speculative_config(1, 2)
    one_sentence(caught.value)
    assert "0.99.1" in str(caught.value)
    assert seams.SUPPORTED_VLLM[0] in str(caught.value)


def test_flags_and_json_may_not_contradict() -> None:
    args = fresh()
    hooks.install(args, [])
    with pytest.raises(ValueError, match="mutually exclusive"):
        args({"method": "clover2"}, spec_method="eagle").create_speculative_config(1, 2)


class FakeParams:
    """Stands for SamplingParams; the original refuses every speculation."""

    def _validate_spec_decode(self, speculative_config: Any) -> None:
        if speculative_config is not None:
            raise ValueError("not supported with speculative decoding")


class Says:
    """Stands for a speculative configuration with `samples_every_token`."""

    def __init__(self, answer: bool) -> None:
        self._answer = answer

    def samples_every_token(self) -> bool:
        return self._answer


def test_other_methods_still_refuse_sampling_parameters() -> None:
    class Params(FakeParams):
        _validate_spec_decode = FakeParams._validate_spec_decode

    hooks.install_sampling(Params)
    hooked = Params._validate_spec_decode
    hooks.install_sampling(Params)
    assert Params._validate_spec_decode is hooked
    Params()._validate_spec_decode(None)
    Params()._validate_spec_decode(Says(True))
    for other in (Says(False), object()):
        with pytest.raises(ValueError, match="not supported"):
            Params()._validate_spec_decode(other)


def test_other_methods_still_build_no_logits_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker import gpu_model_runner

    seen: list[Any] = []

    def original(vllm_config: Any, *args: Any) -> str:
        seen.append((vllm_config.speculative_config, *args))
        return "built"

    monkeypatch.setattr(gpu_model_runner, "build_logitsprocs", original)
    hooks.install_logits_processors()
    hooked = gpu_model_runner.build_logitsprocs
    hooks.install_logits_processors()
    assert gpu_model_runner.build_logitsprocs is hooked
    ngram, clover = object(), Says(True)
    for given, reaches in ((None, None), (ngram, ngram), (clover, None)):
        config = SimpleNamespace(speculative_config=given)
        assert hooked(config, "cpu") == "built"
        assert seen.pop() == (reaches, "cpu")
        assert config.speculative_config is given


def test_unsupported_vllm_keeps_its_own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who asks for clover2 hears of it."""
    from transformers import AutoConfig

    monkeypatch.setattr(seams, "SUPPORTED_VLLM", ("0.1.0",))
    spies = {name: Mock() for name in ("install", "install_sampling", "install_async_scheduling")}
    for name, spy in spies.items():
        monkeypatch.setattr(hooks, name, spy)
    monkeypatch.setattr(AutoConfig, "register", Mock())
    plugin.register()
    spies["install"].assert_called_once()
    spies["install_sampling"].assert_not_called()
    spies["install_async_scheduling"].assert_not_called()
    AutoConfig.register.assert_not_called()


def test_registering_twice_is_harmless() -> None:
    plugin.register()
    hooked = EngineArgs.create_speculative_config
    plugin.register()
    assert EngineArgs.create_speculative_config is hooked


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny target, and an untrained head for another one."""
    folder = tmp_path_factory.mktemp("pair")
    target = tiny_llama(folder / "target")
    save_head(head_for(FrozenTarget(target, torch.float32)), folder / "head")
    return target, folder / "head"


def test_clover_configuration_travels_in_vllms(pair: tuple[Path, Path]) -> None:
    """Validated, EAGLE-like for the scheduler, and pickled to the worker."""
    import pickle

    target, head = pair
    made = configuration(target, {"model": str(head), "draft_width": 3})
    spec = pickle.loads(pickle.dumps(made.speculative_config))
    assert spec.method == "clover2"
    assert spec.num_speculative_tokens == 16
    assert spec.clover.draft_width == 3
    assert spec.use_eagle()
    assert made.num_prefill_lookahead_tokens == 1
    assert made.parallel_config.worker_cls == "clover_vllm.engine.worker.CloverCPUWorker"
    assert not made.scheduler_config.async_scheduling


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"num_speculative_tokens": 64}, {}, "num_speculative_tokens"),
        ({"num_speculative_tokens": 0}, {}, "num_speculative_tokens"),
        ({"num_speculative_tokens": "8"}, {}, "num_speculative_tokens"),
        ({"model": None}, {}, "needs a head"),
        ({"model": "missing/head"}, {}, "missing/head"),
        ({"draft_tensor_parallel_size": 3}, {}, "draft_tensor_parallel_size"),
        ({"treee": "chain"}, {}, "Did you mean tree?"),
        ({"method": "clover"}, {}, "did you mean 'clover2'"),
        ({}, {"pipeline_parallel_size": 2}, "pipeline"),
        ({"tree": [[900]]}, {}, "child rank 900"),
        ({}, {"worker_cls": "a.b.Worker"}, "worker"),
        ({}, {"watermark_config": {"algorithm": "gumbel"}}, "watermarks"),
        ({}, {"attention_config": {"hisparse_config": {}}}, "HiSparse"),
    ],
)
def test_bad_configurations_are_refused_before_the_engine_starts(
    pair: tuple[Path, Path], changes: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    target, head = pair
    given = {"method": "clover2", "model": str(head), **changes}
    with pytest.raises(UserError, match=words) as caught:
        configuration(target, {k: v for k, v in given.items() if v is not None}, **more)
    assert "\n" not in str(caught.value)


def test_v2_without_triton_is_refused_before_the_engine_starts(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(UserError, match="V2 model runner without Triton"):
        configuration(pair[0], {"method": "clover2", "model": str(pair[1])})


@pytest.mark.parametrize("chosen", [None, "0", "1"])
def test_clover_runs_on_the_runner_that_vllm_chooses(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    """As on a machine with Triton; pickled to the worker, it is the same."""
    import pickle

    import vllm.config.vllm

    monkeypatch.setattr(vllm.config.vllm, "HAS_TRITON", True)
    monkeypatch.setattr("clover_vllm.engine.support.HAS_TRITON", True)
    monkeypatch.setattr(vllm.config.VllmConfig, "_validate_v2_model_runner", Mock())
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if chosen is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", chosen)
    made = configuration(pair[0], {"method": "clover2", "model": str(pair[1])})
    for config in (made, pickle.loads(pickle.dumps(made))):
        assert config.use_v2_model_runner == (chosen != "0")
        assert config.speculative_config.disable_padded_drafter_batch == (chosen == "0")
    assert os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == chosen, "later engines of the process choose anew"


def test_a_step_of_clover_may_be_scheduled_ahead() -> None:
    from typing import get_args

    import vllm.config.vllm

    before = get_args(vllm.config.vllm.EagleModelTypes)
    hooks.install_async_scheduling()
    found = get_args(vllm.config.vllm.EagleModelTypes)
    assert set(found) == {*before, "clover2"}
    hooks.install_async_scheduling()
    assert get_args(vllm.config.vllm.EagleModelTypes) == found


CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("config", "more", "words"),
    [
        ({}, {"kv_cache_dtype": "fp8"}, "the KV cache type fp8"),
        ({}, {"kv_cache_dtype": "float16"}, "the KV cache type float16"),
        ({}, {"kv_transfer_config": CONNECTOR}, "a KV connector"),
        ({"attention_chunk_size": 64}, {}, "chunked local attention"),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16},
            {},
            "sliding-window attention",
        ),
        (
            {
                "architectures": ["Gemma2ForCausalLM"],
                "model_type": "gemma2",
                "attn_logit_softcapping": 50.0,
                "query_pre_attn_scalar": 32,
            },
            {},
            "soft-capped scores",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
            {},
            "M-RoPE",
        ),
        (
            {
                "architectures": ["DeepseekV2ForCausalLM"],
                "model_type": "deepseek_v2",
                "kv_lora_rank": 32,
                "q_lora_rank": None,
                "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 32,
                "v_head_dim": 32,
            },
            {},
            "multi-head latent attention",
        ),
        ({"architectures": ["OPTForCausalLM"], "model_type": "opt"}, {}, "SupportsEagle3"),
    ],
)
def test_targets_that_are_not_supported_are_refused_before_the_engine_starts(
    pair: tuple[Path, Path], tmp_path: Path, config: dict[str, Any], more: dict[str, Any], words: str
) -> None:
    """Where only trees do not work, the sentence names the way out, and that is open."""
    target = shutil.copytree(pair[0], tmp_path / "target")
    file = target / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    given = {"method": "clover2", "model": str(pair[1])}
    with pytest.raises(UserError, match=words) as caught:
        configuration(target, given, **more)
    one_sentence(caught.value)
    if '"chain"' in str(caught.value) and "architectures" not in config:
        configuration(target, {**given, "tree": "chain"}, **more)


def test_the_plugin_survives_a_vllm_without_our_base_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another version nothing of ours that derives from vLLM's classes is imported unless asked for."""
    monkeypatch.setitem(sys.modules, "clover_vllm.engine.config", None)
    monkeypatch.setitem(sys.modules, "vllm.config.speculative", None)
    args = fresh()
    hooks.install(args, ["vLLM is 0.99.1"])
    assert args({"method": "ngram"}).create_speculative_config(1, 2) == ("original", 1, 2)
    with pytest.raises(UserError, match=r"works with vLLM 0\.32\.0"):
        args({"method": "clover2"}).create_speculative_config(1, 2)


@pytest.mark.parametrize("tied", [True, False])
def test_head_of_a_target_of_the_same_sizes_is_refused_before_the_engine_starts(
    pair: tuple[Path, Path], tmp_path: Path, tied: bool
) -> None:
    """By a few rows of the lm_head in the target's files; its own target, and one that does not show them, pass."""
    from safetensors.torch import load_file, save_file

    target, head = shutil.copytree(pair[0], tmp_path / "own"), shutil.copytree(pair[1], tmp_path / "head")
    weights = load_file(target / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    if not tied:
        weights["lm_head.weight"] = embeddings.clone()
        weights["model.embed_tokens.weight"] = 2 * embeddings
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    edit(target, tie_word_embeddings=tied)
    edit(head, target_probe=probe_lm_head(embeddings))
    given = {"method": "clover2", "model": str(head)}
    configuration(target, given)

    other = shutil.copytree(target, tmp_path / "other")
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    save_file({**weights, name: 1.5 * weights[name]}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="another model's") as caught:
        configuration(other, given)
    one_sentence(caught.value)
    for hidden in ({}, {name: torch.zeros(3, 4)}, {name: weights[name].to(torch.int8)}):
        save_file(hidden, other / "model.safetensors", {"format": "pt"})
        configuration(other, given)
    (other / "model.safetensors").write_bytes(b"damaged")
    configuration(other, given)


def cache_of_hub(folder: Path, **heads: Path) -> None:
    """What the hub's client leaves behind after downloading `clover/NAME` for each name."""
    for name, files in heads.items():
        repository = folder / f"models--clover--{name}"
        shutil.copytree(files, repository / "snapshots" / "0123abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123abc")


@pytest.mark.slow
def test_heads_of_the_hub_are_checked_before_the_engine_starts(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    target, good = pair
    nan, cut, bare = (shutil.copytree(good, tmp_path / name) for name in ("nan", "cut", "bare"))
    weights = load_file(good / "model.safetensors")
    weights["clover_norm.weight"][3] = float("nan")
    save_file(weights, nan / "model.safetensors")
    (cut / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:5000])
    (bare / "model.safetensors").unlink()
    cache_of_hub(tmp_path / "home" / "hub", good=good, nan=nan, cut=cut, bare=bare)
    elsewhere = (
        tmp_path / "elsewhere"
    )  # as vLLM's loader leaves it: weights alone, and no name for the commit
    cache_of_hub(elsewhere, cut=cut)
    shutil.rmtree(elsewhere / "models--clover--cut" / "refs")
    (elsewhere / "models--clover--cut" / "snapshots" / "0123abc" / "config.json").unlink()

    def arguments(name: str, **more: Any) -> dict[str, Any]:
        speculative = {"method": "clover2", "model": f"clover/{name}"}
        return {"model": str(target), "skip_tokenizer_init": True, "speculative_config": speculative, **more}

    asked = [arguments(name) for name in ("good", "nan", "cut", "bare", "none")]
    asked += [arguments("cut", load_format="dummy")]
    asked += [arguments(name, download_dir=str(elsewhere)) for name in ("cut", "nan")]
    home = tmp_path / "home"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
    found = run_script("run_configs", asked, env=offline)
    words = [None, "not finite", "damaged", "no weights", "clover/none", None, "damaged", None]
    for error, word in zip(found, words, strict=True):
        if word is None:
            assert error is None
        else:
            assert error[0] == "UserError"
            assert word in error[1]
            one_sentence(UserError(error[1]))


def edit(folder: Path, **changes: Any) -> None:
    """Change a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_head_of_another_target_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", vocab=300)
    with pytest.raises(UserError, match="vocab_size 211") as caught:
        configuration(other, {"method": "clover2", "model": str(pair[1])})
    one_sentence(caught.value)


@pytest.mark.slow
def test_the_worker_for_gpus_leaves_cuda_alone() -> None:
    """vLLM's CPU worker replaces CUDA's streams as it is imported."""
    check = (
        "import torch; stream, event = torch.cuda.Stream, torch.cuda.Event;"
        "import clover_vllm.engine.gpu_worker, clover_vllm.engine.plugin, clover_vllm.engine.config;"
        "assert (torch.cuda.Stream, torch.cuda.Event) == (stream, event)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
