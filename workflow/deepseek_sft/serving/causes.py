"""The causes that logs of a deployment name, in the words of vLLM 0.32, Ray, torch and the kernel, and their fixes."""

import dataclasses
import re
from collections.abc import Iterable

AGAIN = "make the model folder again: snakemake --profile <profile> --forcerun convert_checkpoint"
NETWORK = (
    "set serve.network_interface to the interface between the nodes; serve.environment NCCL_DEBUG: INFO tells more"
)


@dataclasses.dataclass(frozen=True)
class Cause:
    """A cause that a log names.

    Attributes:
        pattern: finds it in an exception or one of the last lines.
        problem: what it means.
        fix: what to change.
        permanent: whether the same start would fail again.
        general: it says where another line says what, or how a node noticed another's end: any other comes before it.
    """

    pattern: re.Pattern[str]
    problem: str
    fix: str
    permanent: bool = True
    general: bool = False


def _words(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.MULTILINE)


CAUSES = (
    Cause(
        _words(r"^(?:vllm|ray)(?: \w+)?: error: "),
        "vLLM does not accept its command line",
        "see serve.engine_args; `vllm serve --help=all` lists the options of the installed version",
    ),
    Cause(
        _words("OutOfMemoryError", "CUDA out of memory", "Free memory on device .* is less than"),
        "out of GPU memory",
        "use more GPUs (serve.tensor_parallel_size, serve.pipeline_parallel_size and the profile's nodes), set "
        "serve.engine_args gpu-memory-utilization lower if something else runs there, or lower serve.max_model_len",
    ),
    Cause(
        _words("No available memory for the cache", "larger than the (?:available KV|maximum number of tokens)"),
        "out of memory for the KV cache",
        "lower serve.max_model_len, raise serve.engine_args gpu-memory-utilization (or kv-cache-memory-bytes where it "
        "is set), or use more GPUs",
    ),
    Cause(
        _words("DefaultCPUAllocator: can't allocate memory", "Cannot allocate memory", "^MemoryError"),
        "out of host memory",
        "raise `mem_mb` of this rule in the profile",
    ),
    Cause(
        _words("No space left on device"),
        "a file system of the node is full",
        "look at /dev/shm and /tmp of that node",
    ),
    Cause(
        _words("[Aa]ddress already in use", "EADDRINUSE"),
        "a port was taken by another program between its choice and its use",
        "start again; with serve.port set, choose another one or 0 for a free one",
        permanent=False,
    ),
    Cause(
        _words("could not locate think start/end tokens"),
        "the tokenizer lacks the tokens that serve.reasoning_parser looks for",
        "set serve.reasoning_parser to the parser of this model, or null",
    ),
    Cause(
        _words(
            r"is greater than the derived max_model_len",
            r"max_model_len must be a positive integer",
        ),
        "serve.max_model_len is longer than the model's context",
        "lower serve.max_model_len to the number that the message gives; where the model should have more, its "
        "config.json lacks max_position_embeddings or rope_scaling of the release: compare it with the base's",
    ),
    Cause(
        _words(
            r"Tokenizer class \S+ does not exist or is not currently imported",
            r"Failed to load the tokenizer",
            r"requires you to execute the tokenizer file",
        ),
        "the transformers of the serving environment does not know the tokenizer's class",
        "TokenizersBackend is transformers 5's: install it in that environment, or name a class that both know "
        "(PreTrainedTokenizerFast) as tokenizer_class in tokenizer_config.json of the base, and convert again",
    ),
    Cause(
        _words(
            r"contains custom code which must be executed",
            r"requires you to execute the configuration file",
            r"[`'\"]trust_remote_code=True[`'\"]",
            r"does not recognize this architecture",
            r"Model architectures .* are not supported",
            r"Model architectures .* failed to be inspected",
            r"No model architectures are specified",
        ),
        "the model needs code that vLLM does not have",
        "converted models need none: compare architectures, model_type and auto_map of its config.json with the "
        "release's (DeepseekV3ForCausalLM, deepseek_v3, none), or set serve.engine_args trust-remote-code: true for "
        "code that you trust",
    ),
    Cause(
        _words(
            r"Quantization method specified in the model config .* does not match",
            r"(?:Unknown|Invalid) quantization (?:method|strategy|scheme)",
            r"Invalid modelopt quantization",
            r"Cannot find the config file for",
        ),
        "the model's quantisation is not the one that it is served with",
        "take quantization out of serve.engine_args: config.json of the model says how it is stored; where that is "
        f"wrong, {AGAIN}",
    ),
    Cause(
        _words(
            r"\bdivisible by",
            r"[Tt]ensor parallel size .* is greater than the number of experts",
        ),
        "the model's sizes do not divide as the deployment splits them",
        "choose serve.tensor_parallel_size so that it divides the attention heads (128 of the release) and, in FP8, "
        "leaves parts of whole blocks of 128: 1, 2, 4, 8 or 16 for the release; more GPUs go into "
        "serve.pipeline_parallel_size",
    ),
    Cause(
        _words(
            r"SafetensorError",
            r"Cannot find any model weights",
            r"e_score_correction_bias",
            r"size mismatch for",
            r"weights were not initialized from checkpoint",
            r"There is no module or parameter named",
            r"Attempted to load weight",
            r"KeyError: ['\"](?:model\.|language_model\.)*(?:layers\.\d+\.|embed_tokens|norm\.|lm_head)",
            r"start \(\d+\) \+ length \(\d+\) exceeds dimension size",
            r"The size of tensor a \(\d+\) must match the size of tensor b",
            r"shape .* is invalid for input of size",
            r"The expanded size of the tensor \(\d+\) must match the existing size",
        ),
        "the weights do not fit the model's config.json",
        f"{AGAIN}; a name with layers.61 is the multi-token-prediction layer (convert.mtp), one with weight_scale_inv "
        "a scale of FP8 weights (quantization_config)",
    ),
    Cause(
        _words(r"is not supported by MLA"),
        "the model's attention dimensions are not those of the release, which vLLM's MLA needs",
        "set serve.environment VLLM_MLA_DISABLE: 1",
    ),
    Cause(
        _words(r"No module named 'ray'", r"No such file or directory: 'ray'", r"Please install Ray"),
        "Ray is not installed in the serving environment",
        "set serve.backend: native, or install ray there",
    ),
    Cause(
        _words(
            r"Cannot provide a placement group",
            r"required GPUs exceeds the total number of available GPUs",
            r"You don't have enough GPUs available",
            r"exceeds available GPUs",
            r"World size \(\d+\) is larger than the number of",
            r"No CUDA GPUs are available",
            r"no CUDA-capable device is detected",
            r"invalid device ordinal",
            r"Failed to infer device type",
            r"Device string must not be empty",
        ),
        "the deployment finds fewer GPUs than it is to use",
        "serve.tensor_parallel_size × serve.pipeline_parallel_size must be the GPUs of all nodes: give the rule "
        "smoke_test that many in the profile (nodes, gpu), and look at `nvidia-smi` and CUDA_VISIBLE_DEVICES there",
    ),
    Cause(
        _words(r"NVIDIA driver on your system is too old", r"no kernel image is available", r"CUDA driver version is"),
        "vLLM was built for another CUDA than the node's driver or GPU has",
        "install the vLLM of the driver's CUDA version in the serving environment (`nvidia-smi` shows it), or ask for "
        "a newer driver",
    ),
    Cause(
        _words(r"PermissionError"),
        "a file may not be read or written",
        "look at the permissions of the file that the message names, as the user that runs the job",
    ),
    Cause(
        _words(r"^OSError: \[Errno 24\]"),
        "the limit of open files is too low",
        "raise it (`ulimit -n 65536`), in the profile's or the site's start-up files",
    ),
    Cause(
        _words(r"Stale file handle", r"Input/output error", r"Transport endpoint is not connected"),
        "the shared file system failed",
        "start again; if it comes back, copy the model to another file system, and tell the site",
        permanent=False,
    ),
    Cause(
        _words(r"NCCL error", "ncclSystemError", "ncclRemoteError", "ncclInternalError"),
        "NCCL failed to connect the GPUs",
        NETWORK,
        permanent=False,
        general=True,
    ),
    Cause(
        _words(r"[Gg]loo/transport", r"Gloo connectFullMesh failed"),
        "the nodes' processes could not connect, or lost each other",
        NETWORK,
        permanent=False,
        general=True,
    ),
    Cause(
        _words(r"validation errors? for \w*Config"),
        "vLLM refuses its settings",
        "the line after it in the log says which; see serve.* and serve.engine_args",
        general=True,
    ),
)  # fmt: skip


def named_in(lines: Iterable[tuple[str, str]]) -> tuple[str, Cause, str] | None:
    """Node, cause, and the line that names it; None where no known cause is named.

    Args:
        lines: nodes and lines of their logs, in the order in which they count.
    """
    pairs = list(lines)
    for general in (False, True):
        for node, line in pairs:
            for cause in CAUSES:
                if cause.general == general and cause.pattern.search(line):
                    return node, cause, line.strip()[:300]
    return None
