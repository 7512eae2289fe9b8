"""Command lines, environments and settings of the serving stage."""

import json
from pathlib import Path

import pytest

from deepseek_sft.errors import BadInputError
from deepseek_sft.serving import settings, vllm_commands

SETTINGS = settings.parse(
    {
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 2,
        "max_model_len": 4096,
        "engine_args": {"enable-expert-parallel": True, "gpu-memory-utilization": 0.9, "enable-log-requests": False},
    }
)
HEAD = vllm_commands.Place(0, 2, "10.0.0.1", "ib0", "10.0.0.1")
WORKER = vllm_commands.Place(1, 2, "10.0.0.2", "ib0", "10.0.0.1")
ALONE = vllm_commands.Place(0, 1, "127.0.0.1", "lo", "127.0.0.1")
COMMON = (
    "vllm serve /model --served-model-name deepseek-r1-sft --max-model-len 4096 --tensor-parallel-size 8 "
    "--pipeline-parallel-size 2 --dtype auto --reasoning-parser deepseek_r1 "
)
EXTRA = " --enable-expert-parallel --gpu-memory-utilization 0.9 --no-enable-log-requests"


def serve(place: vllm_commands.Place, version=(0, 32, 0), **changes) -> str:
    given = settings.parse(json.loads(json.dumps(vars(SETTINGS) | changes | {"smoke_test": {}})))
    return " ".join(
        vllm_commands.serve_command(
            "vllm", "/model", given, place, host="10.0.0.1", port=8000, master_port=29501, version=version
        )
    )


@pytest.mark.parametrize(
    ("place", "backend", "middle"),
    [
        (ALONE, "native", "--host 10.0.0.1 --port 8000"),
        (ALONE, "ray", "--distributed-executor-backend ray --host 10.0.0.1 --port 8000"),
        (HEAD, "ray", "--distributed-executor-backend ray --host 10.0.0.1 --port 8000"),
        (
            HEAD,
            "native",
            "--distributed-executor-backend mp --nnodes 2 --node-rank 0 --master-addr 10.0.0.1 --master-port 29501 "
            "--host 10.0.0.1 --port 8000",
        ),
        (
            WORKER,
            "native",
            "--distributed-executor-backend mp --nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29501 "
            "--headless",
        ),
    ],
)
def test_vllm_command_by_backend_and_role(place, backend, middle):
    assert serve(place, backend=backend) == COMMON + middle + EXTRA


def test_ray_command_by_role():
    def ray(place: vllm_commands.Place) -> str:
        words = vllm_commands.ray_command(
            "ray", SETTINGS, place, gcs_port=6380, agent_port=52366, client_port=10001, folder=Path("/tmp/serve-x")
        )
        return " ".join(words)

    rest = (
        "--dashboard-agent-listen-port=52366 --min-worker-port=0 --max-worker-port=0 --num-gpus=8 --num-cpus=9 "
        "--object-store-memory=268435456 --temp-dir=/tmp/serve-x --disable-usage-stats"
    )
    assert ray(HEAD) == (
        "ray start --block --head --port=6380 --ray-client-server-port=10001 --include-dashboard=false "
        f"--node-ip-address=10.0.0.1 {rest}"
    )
    assert ray(WORKER) == f"ray start --block --address=10.0.0.1:6380 --node-ip-address=10.0.0.2 {rest}"


def test_engine_args_values_become_words():
    flags = {"a": True, "b": False, "c": None, "d": 1.5, "e": {"mode": 2, "backend": "eager"}, "f": ["x", "y"]}
    expected = ["--a", "--no-b", "--d", "1.5", "--e", '{"mode":2,"backend":"eager"}', "--f", "x", "y"]
    assert vllm_commands.as_arguments(flags) == expected


def test_no_reasoning_parser_flag_without_a_parser():
    assert "reasoning" not in serve(ALONE, reasoning_parser=None)


def test_settings_environment_wins_and_key_stays_off_the_command_line():
    given = settings.parse({"environment": {"VLLM_HOST_IP": "1.2.3.4", "OMP_NUM_THREADS": 1}})
    found = vllm_commands.environment(
        {"HOME": "/home/x"}, given, HEAD, Path("/tmp/serve-x"), ray=(6380, "token"), api_key="secret"
    )
    assert found["VLLM_HOST_IP"] == "1.2.3.4"
    assert found["OMP_NUM_THREADS"] == "1"
    assert found["VLLM_API_KEY"] == "secret"
    assert (found["GLOO_SOCKET_IFNAME"], found["NCCL_SOCKET_IFNAME"]) == ("ib0", "=ib0")
    assert (found["RAY_ADDRESS"], found["HOME"]) == ("10.0.0.1:6380", "/home/x")
    assert (found["RAY_AUTH_MODE"], found["RAY_AUTH_TOKEN"]) == ("token", "token")
    words = vllm_commands.serve_command("vllm", "/model", given, HEAD, host="h", port=1, master_port=2)
    assert "secret" not in " ".join(words)


def test_engine_start_waits_as_long_as_our_own_deadline():
    given = settings.parse({"ready_timeout_s": 7200})
    assert vllm_commands.environment({}, given, HEAD, Path("/tmp"))["VLLM_ENGINE_READY_TIMEOUT_S"] == "7200"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"tensor_parallel_sise": 2}, "tensor_parallel_sise: unknown key; did you mean `tensor_parallel_size`"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size: '2' is not allowed, expected an integer"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size: True is not allowed, expected an integer"),
        ({"tensor_parallel_size": 0}, "expected an integer of at least 1"),
        ({"backend": "mpi"}, "expected one of native, ray"),
        ({"port": 70000}, "port: 70000 is not allowed, expected an integer of at least 0 and at most 65535"),
        ({"engine_args": {"--node_rank": 3}}, "engine_args.node-rank: is decided by"),
        ({"engine_args": {"api-key": "x"}}, "engine_args.api-key: is decided by serve.api_key_file"),
        ({"environment": {"VLLM_API_KEY": "x"}}, "environment.VLLM_API_KEY: would stand in the results"),
        ({"engine_args": {"ssl-keyfile": "x"}}, "engine_args.ssl-keyfile: is not supported"),
        ({"smoke_test": {"min_format_rate": 2}}, "smoke_test.min_format_rate"),
        ({"smoke_test": {"prompt": "x"}}, "smoke_test.prompt: unknown key; did you mean `prompts`"),
        ([], "expected an object"),
    ],
)
def test_bad_settings_name_the_key(value, problem):
    with pytest.raises(BadInputError, match=problem):
        settings.parse(value)


def test_unknown_key_suggests_the_nearest():
    with pytest.raises(BadInputError) as raised:
        settings.parse({"max_model_length": 4096})
    assert "did you mean `max_model_len`? Write:\n        max_model_len: 4096" in raised.value.problem


def test_ranks_must_spread_evenly_over_the_nodes():
    assert SETTINGS.local_world_size(4) == 4
    with pytest.raises(BadInputError, match="16 processes do not spread evenly over 3 nodes"):
        SETTINGS.local_world_size(3)
