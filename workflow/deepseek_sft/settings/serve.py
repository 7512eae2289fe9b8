"""The served deployment."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from .field_types import AboveZero, Positive, Text, Truth, Variables, Whole, section, setting

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
        if len(self.flags) < len(self.engine_args):
            yield f"engine_args: the same flag stands there twice, with - and with _: {', '.join(self.engine_args)}"
        for flag in self.flags:
            if flag in UNSUPPORTED_FLAGS:
                yield f"engine_args.{flag}: is not supported; serve plain HTTP and put a proxy or a tunnel before it"
            elif flag in DECIDED_FLAGS:
                yield f"engine_args.{flag}: is decided by {DECIDED_FLAGS[flag]}; remove {flag} from engine_args"
            elif self.tool_call_parser and flag in DECIDED_BY_TOOLS:
                yield f"engine_args.{flag}: is decided by serve.tool_call_parser; remove {flag} from engine_args"

    @property
    def variables(self) -> dict[str, str]:
        """``environment`` as text."""
        return {name: str(value) for name, value in self.environment.items()}

    @property
    def flags(self) -> dict[str, Any]:
        """``engine_args`` by the names that vLLM knows them by."""
        return {name.lstrip("-").replace("_", "-"): value for name, value in self.engine_args.items()}
