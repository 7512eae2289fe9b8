"""The served deployment."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from .field_types import AboveZero, Positive, Text, Truth, Variables, Whole, keys, section, setting

# Flags that follow from the allocation or from a setting of their own; engine_args must not contradict them.
DECIDED_FLAGS = {
    "nnodes": "the allocation's nodes",
    "node-rank": "the allocation's nodes",
    "master-addr": "the head node",
    "master-port": "a free port of the head node",
    "headless": "the node's role",
    "distributed-executor-backend": "serve.backend",
    "tensor-parallel-size": "serve.tensor_parallel_size",
    "pipeline-parallel-size": "serve.pipeline_parallel_size",
    "host": "serve.host",
    "port": "serve.port",
    "api-key": "serve.api_key_file",
    "max-model-len": "serve.max_model_len",
    "served-model-name": "serve.served_model_name",
    "reasoning-parser": "serve.reasoning_parser",
    "dtype": "serve.dtype",
    "trust-remote-code": "serve.trust_remote_code",
    "uds": "serve.host",
    "data-parallel-address": "the head node",
    "data-parallel-rpc-port": "a free port of the head node",
    "data-parallel-rank": "the node's place",
    "data-parallel-start-rank": "the node's place",
    "data-parallel-size-local": "the allocation's nodes",
}
# Flags with a setting of their own that came later: they may still stand in engine_args, but not in both places.
LATER_SETTINGS = {
    "data-parallel-size": "data_parallel_size",
    "enable-expert-parallel": "expert_parallel",
    "load-format": "load_format",
    "distributed-timeout-seconds": "distributed_timeout_s",
}
AUTO = "auto"
# Where serve.tool_call_parser is set.
DECIDED_BY_TOOLS = ("tool-call-parser", "enable-auto-tool-choice")
# The server is watched over plain HTTP; encryption belongs to a proxy in front of it, or to a tunnel.
UNSUPPORTED_FLAGS = ("ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "root-path")


@section
class Serve:
    backend: Literal["native", "ray"] = "native"
    """vLLM's own multi-node mode or Ray."""
    tensor_parallel_size: Positive = 8
    """GPUs that share each layer."""
    pipeline_parallel_size: Positive = 4
    """Groups of layers."""
    data_parallel_size: Positive = setting(1, later=True)
    """Replicas of attention, each on `tensor_parallel_size` × `pipeline_parallel_size` GPUs and with requests and a KV
    cache of its own. Routed experts are never copied: all replicas hold a part of them."""
    expert_parallel: Truth = setting(False, later=True)
    """A GPU holds whole routed experts, over data and tensor parallel ranks, instead of a slice of each."""
    max_model_len: Annotated[Whole, Ge(16)] = 32768
    """Longest context in tokens."""
    served_model_name: Text = "deepseek-r1-sft"
    """Model name of the API."""
    reasoning_parser: Text | None = "deepseek_r1"
    """vLLM's parser that splits reasoning from answer; `auto` is that of the model's family, none where its chat
    template writes no tags of thinking."""
    tool_call_parser: Text | None = setting(None, later=True)
    """vLLM's parser that takes tool calls out of answers, with `--enable-auto-tool-choice`; `auto` is that of the
    model's family. null leaves calls in the text."""
    dtype: Text = "auto"
    """Dtype of the served weights in vLLM's words."""
    trust_remote_code: Truth = False
    """Run Python files of the model folder."""
    host: Text | None = setting(None, operational=True)
    """Address a lasting deployment listens on; null is the head node's address on the cluster's network. A smoke test
    always listens on loopback."""
    port: Annotated[Whole, Ge(0), Le(65535)] = setting(0, operational=True)
    """Port of a lasting deployment; 0 takes a free one."""
    api_key_file: Text | None = setting(None, operational=True)
    """File, readable by you alone, with the key that clients of a lasting deployment must send; null makes one,
    `<results>/<experiment>/serve/api_key`."""
    network_interface: Text | None = None
    """Interface between nodes; null is the one that routes to the head."""
    ready_timeout_s: AboveZero = setting(3600, operational=True)
    """Deadline in seconds until the server answers."""
    stop_grace_s: AboveZero = setting(30, operational=True)
    """Seconds between the request to stop and the kill."""
    load_format: Literal["auto", "safetensors", "fastsafetensors", "instanttensor"] = setting(
        "auto", operational=True, later=True
    )
    """How vLLM reads the weights (docs/serving.md); the last two need GPUs."""
    distributed_timeout_s: AboveZero | None = setting(None, operational=True, later=True)
    """Deadline in seconds of one collective between the engine's processes, which nodes that load slower than others
    must not reach; null is `ready_timeout_s`, below which it may not be."""
    deployment_engine_args: dict[str, Any] = setting({}, operational=True, later=True)
    """Flags that a lasting deployment has beside or instead of those of `engine_args`; null leaves one out that only
    the smoke test needs."""
    engine_args: dict[str, Any] = setting({})
    """Further flags of `vllm serve`, name without dashes in front: a value, true (bare flag), false (`--no-<flag>`), a
    mapping (JSON), a list (several values) or null (leave out)."""
    environment: Variables = setting({})
    """Environment variables of every serving process."""
    secrets_file: Text | None = setting(None, operational=True, later=True)
    """As `train.secrets_file`, for the serving processes."""

    def problems(self) -> Iterator[str]:
        if "VLLM_API_KEY" in self.environment:
            yield (
                "environment.VLLM_API_KEY: would stand in the results for all to read; put the key into a file of mode "
                "0600 and set serve.api_key_file"
            )
        yield from self._flag_problems("engine_args")
        yield from self._flag_problems("deployment_engine_args")
        for flag, name in LATER_SETTINGS.items():
            if flag in self.flags and getattr(self, name) != keys(Serve)[name].default:
                yield f"engine_args.{flag}: serve.{name} says it as well; remove {flag} from engine_args"
        replicas = self.flags.get("data-parallel-size")
        if replicas is not None and not (isinstance(replicas, int) and replicas >= 1):
            yield f"engine_args.data-parallel-size: {replicas!r} is no number of replicas; write data_parallel_size: 2"
        elif self.replicas > 1 and self.backend == "ray":
            yield "data_parallel_size: more than 1 needs vLLM's own mode here; write backend: native"
        timeout = self.distributed_timeout_s
        if timeout is not None and timeout < self.ready_timeout_s:
            yield (
                f"distributed_timeout_s: {timeout:g} is below ready_timeout_s ({self.ready_timeout_s:g}): nodes that "
                "wait for the slowest to load would end first; raise it, or leave it null"
            )

    def _flag_problems(self, key: str) -> Iterator[str]:
        """What of ``engine_args`` or ``deployment_engine_args`` cannot be passed on."""
        given = getattr(self, key)
        names = [named(name) for name in given]
        if len(set(names)) < len(names):
            yield f"{key}: the same flag stands there twice, with - and with _: {', '.join(given)}"
        for flag in names:
            if flag in UNSUPPORTED_FLAGS:
                yield f"{key}.{flag}: is not supported; serve plain HTTP and put a proxy or a tunnel before it"
            elif flag in DECIDED_FLAGS:
                yield f"{key}.{flag}: is decided by {DECIDED_FLAGS[flag]}; remove {flag} from {key}"
            elif self.tool_call_parser and flag in DECIDED_BY_TOOLS:
                yield f"{key}.{flag}: is decided by serve.tool_call_parser; remove {flag} from {key}"
            elif key != "engine_args" and flag in LATER_SETTINGS:
                yield f"{key}.{flag}: is decided by serve.{LATER_SETTINGS[flag]}; remove {flag} from {key}"

    @property
    def variables(self) -> dict[str, str]:
        """``environment`` as text."""
        return {name: str(value) for name, value in self.environment.items()}

    @property
    def flags(self) -> dict[str, Any]:
        """``engine_args`` by the names that vLLM knows them by."""
        return {named(name): value for name, value in self.engine_args.items()}

    @property
    def deployment_flags(self) -> dict[str, Any]:
        """The flags of a lasting deployment."""
        return self.flags | {named(name): value for name, value in self.deployment_engine_args.items()}

    @property
    def replicas(self) -> int:
        """Data-parallel replicas, wherever it is said."""
        return self.flags.get("data-parallel-size") or self.data_parallel_size

    @property
    def whole_experts(self) -> bool:
        """Whether a GPU holds whole experts, wherever it is said."""
        return bool(self.flags.get("enable-expert-parallel")) or self.expert_parallel

    @property
    def ranks_per_replica(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def ranks(self) -> int:
        """Processes that hold a part of the model."""
        return self.ranks_per_replica * self.replicas

    @property
    def sizes(self) -> str:
        """The parallel sizes and their product, for messages."""
        words = [f"tensor_parallel_size {self.tensor_parallel_size}"]
        words.append(f"pipeline_parallel_size {self.pipeline_parallel_size}")
        if self.replicas > 1:
            words.append(f"data_parallel_size {self.replicas}")
        return f"{' × '.join(words)} = {self.ranks}"

    def splits(self, nodes: int) -> bool:
        """Whether nodes hold whole replicas each, or replicas whole nodes: all that vLLM can place."""
        if self.ranks % nodes:
            return False
        local = self.ranks // nodes
        return local % self.ranks_per_replica == 0 or self.ranks_per_replica % local == 0


def named(flag: str) -> str:
    """A flag by the name that vLLM knows it by."""
    return flag.lstrip("-").replace("_", "-")
