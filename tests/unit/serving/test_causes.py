"""Causes that vLLM 0.32, Ray and torch name in their logs: each gets its fix and an exit code."""

import pytest

from deepseek_sft.serving import causes, failures, server_logs

WEIGHTS = "the weights do not fit the model's config.json"
SIZES = "the model's sizes do not divide as the deployment splits them"
GPUS = "the deployment finds fewer GPUs than it is to use"
CODE = "the model needs code that vLLM does not have"
TOKENIZER = "the transformers of the serving environment does not know the tokenizer's class"
QUANTISATION = "the model's quantisation is not the one that it is served with"
CONTEXT = "serve.max_model_len is longer than the model's context"
PREFIX = "(Worker_TP0 pid=85304) ERROR 11-25 17:57:23 [multiproc_executor.py:743] "


def failure(tmp_path, *lines: str) -> failures.NodeFailure:
    """What a log ends with, between vLLM's own lines, as the head reports it."""
    log = tmp_path / "n1.log"
    told = "".join(f"{PREFIX}{line}\n" for line in ("Traceback (most recent call last):", "  File x", *lines))
    end = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
    log.write_text(f"INFO starting\n{told}(EngineCore pid=1) ERROR [core.py:1] {end}\n")
    report = {"node": "n1", "process": "vllm", "exit": "ended with exit code 1", "log": str(log)}
    report |= {"exceptions": server_logs.exceptions(log), "lines": server_logs.last_lines(log, 5)}
    return failures.NodeFailure([report])


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (WEIGHTS, "KeyError: 'layers.61.mlp.experts.w2_weight'"),
        (WEIGHTS, "KeyError: 'model.layers.3.mlp.shared_experts.down_proj.weight_scale_inv'"),
        (WEIGHTS, "ValueError: Following weights were not initialized from checkpoint: {'model.layers.42.x'}"),
        (
            WEIGHTS,
            "ValueError: There is no module or parameter named 'model.x' in DeepseekV3ForCausalLM. The",
        ),
        (WEIGHTS, "AssertionError: Attempted to load weight (torch.Size([515])) into parameter (torch.Size([512]))"),
        (WEIGHTS, "RuntimeError: start (0) + length (576) exceeds dimension size (512)."),
        (WEIGHTS, "RuntimeError: The size of tensor a (128) must match the size of tensor b (64) at dimension 0"),
        (WEIGHTS, "safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge"),
        (
            SIZES,
            "ValueError: Weight output_partition_size = 4608 is not divisible by weight quantization block_n = 128.",
        ),
        (
            SIZES,
            "ValueError: Weight input_size_per_partition = 96 is not divisible by weight quantization block_k = 128.",
        ),
        (SIZES, "ValueError: Total number of attention heads (128) must be divisible by tensor parallel size (24)."),
        (SIZES, "AssertionError: 129280 is not divisible by 24"),
        (
            CONTEXT,
            "ValueError: User-specified max_model_len (200000) is greater than the derived max_model_len (max=1).",
        ),
        (
            CODE,
            "ValueError: The repository /m contains custom code which must be executed to correctly load the model.",
        ),
        (CODE, "ValueError: Model architectures ['X'] are not supported for now. Supported architectures: dict_keys(["),
        (CODE, "ValueError: has model type `x` but Transformers does not recognize this architecture. This could be"),
        (TOKENIZER, "ValueError: Tokenizer class TokenizersBackend does not exist or is not currently imported."),
        (
            TOKENIZER,
            "RuntimeError: Failed to load the tokenizer. If the tokenizer is a custom tokenizer not yet available",
        ),
        (QUANTISATION, "ValueError: Quantization method specified in the model config (fp8) does not match the (awq)."),
        (
            GPUS,
            "ValueError: The number of required GPUs exceeds the total number of available GPUs in the",
        ),
        (
            GPUS,
            "ValueError: Cannot provide a placement group requiring 16 GPUs (placement_group_specs=[]) within 1800 s",
        ),
        (GPUS, "RuntimeError: No CUDA GPUs are available"),
        (GPUS, "RuntimeError: Failed to infer device type, please set the environment variable"),
        (GPUS, "ValueError: World size (16) is larger than the number of available GPUs (8) in this node."),
        ("another CUDA", "RuntimeError: CUDA error: no kernel image is available for execution on the device"),
        ("another CUDA", "RuntimeError: The NVIDIA driver on your system is too old (found version 12020)."),
        (
            "may not be read",
            "PermissionError: [Errno 13] Permission denied: '/models/model-00001-of-00163.safetensors'",
        ),
        ("open files", "OSError: [Errno 24] Too many open files"),
    ],
)
def test_cause_that_the_next_start_would_meet_again_gets_its_fix_and_exit_code_2(tmp_path, problem, line):
    found = failure(tmp_path, line)
    assert problem in found.problem.splitlines()[0]
    assert (found.exit_code, bool(found.fix)) == (2, True)


@pytest.mark.parametrize(
    "line",
    [
        "OSError: [Errno 116] Stale file handle: '/models/model-00001-of-00163.safetensors'",
        "OSError: [Errno 5] Input/output error: '/models/model-00001-of-00163.safetensors'",
        "RuntimeError: Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:144] no error",
        "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled system error",
    ],
)
def test_cause_that_may_be_gone_the_next_time_gets_its_fix_and_exit_code_5(tmp_path, line):
    found = failure(tmp_path, line)
    assert (found.exit_code, bool(found.fix)) == (5, True)


def test_what_pydantic_says_in_the_line_after_its_exception_is_the_cause(tmp_path):
    first = "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig"
    second = "  Value error, User-specified max_model_len (9) is greater than the derived max_model_len (8)"
    assert CONTEXT in failure(tmp_path, first, second, *["  more"] * 10).problem.splitlines()[0]
    assert "vLLM refuses its settings" in failure(tmp_path, first, "  Value error, something else").problem


def test_how_a_node_noticed_anothers_end_is_not_the_cause():
    gloo = "RuntimeError: Gloo connectFullMesh failed: Connection closed by peer"
    node, cause, _ = causes.named_in([("n1", gloo), ("n2", "torch.OutOfMemoryError: CUDA out of memory")])
    assert (node, cause.problem) == ("n2", "out of GPU memory")


@pytest.mark.parametrize(
    "line",
    [
        "INFO non-default args: {'trust_remote_code': True, 'tensor_parallel_size': 8}",
        "INFO Initializing a V1 LLM engine (v0.32.0) with config: trust_remote_code=False, quantization=fp8",
        "WARNING fd limit errors like `OSError: [Errno 24] Too many open files` may come",
        "Some weights of X were not initialized from the model checkpoint at /m and are newly initialized",
    ],
)
def test_ordinary_line_of_a_log_names_no_cause(line):
    assert causes.named_in([("n1", line)]) is None
