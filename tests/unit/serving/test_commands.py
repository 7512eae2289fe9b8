"""Command lines, environments and settings of the serving stage."""

import json
import os
import shutil
from pathlib import Path

import pytest

from deepseek_sft.errors import BadInputError
from deepseek_sft.serving import caches, settings, vllm_commands

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
    "--pipeline-parallel-size 2 --distributed-timeout-seconds 3600 --cpu-distributed-timeout-seconds 3600 --dtype auto "
    "--reasoning-parser deepseek_r1 "
)
EXTRA = " --enable-expert-parallel --gpu-memory-utilization 0.9 --no-enable-log-requests"


def serve(place: vllm_commands.Place, version=(0, 32, 0), **changes) -> str:
    given = settings.parse(json.loads(json.dumps(vars(SETTINGS) | changes | {"smoke_test": {}})))
    return " ".join(
        vllm_commands.serve_command(
            "vllm",
            "/model",
            given,
            place,
            host="10.0.0.1",
            port=8000,
            master_port=29501,
            rpc_port=29550,
            version=version,
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
        {"HOME": "/home/x"}, given, HEAD, Path("/tmp/serve-x"), Path("/tmp/kept"), ray=(6380, "token"), api_key="secret"
    )
    assert found["VLLM_HOST_IP"] == "1.2.3.4"
    assert found["OMP_NUM_THREADS"] == "1"
    assert found["VLLM_API_KEY"] == "secret"
    assert (found["GLOO_SOCKET_IFNAME"], found["NCCL_SOCKET_IFNAME"]) == ("ib0", "=ib0")
    assert (found["RAY_ADDRESS"], found["HOME"]) == ("10.0.0.1:6380", "/home/x")
    assert (found["RAY_AUTH_MODE"], found["RAY_AUTH_TOKEN"]) == ("token", "token")
    words = vllm_commands.serve_command("vllm", "/model", given, HEAD, host="h", port=1, master_port=2, rpc_port=3)
    assert "secret" not in " ".join(words)


def test_engine_start_waits_as_long_as_our_own_deadline():
    given = settings.parse({"ready_timeout_s": 7200})
    assert (
        vllm_commands.environment({}, given, HEAD, Path("/tmp"), Path("/tmp/kept"))["VLLM_ENGINE_READY_TIMEOUT_S"]
        == "7200"
    )


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
        (
            {"engine_args": {"data_parallel_rpc_port": 1}},
            "engine_args.data-parallel-rpc-port: is decided by a free port",
        ),
        ({"deployment_engine_args": {"port": 1}}, "deployment_engine_args.port: is decided by serve.port"),
        ({"deployment_engine_args": {"data-parallel-size": 2}}, "is decided by serve.data_parallel_size"),
        (
            {"engine_args": {"data-parallel-size": 2}, "data_parallel_size": 2},
            "serve.data_parallel_size says it as well",
        ),
        ({"engine_args": {"data-parallel-size": "two"}}, "'two' is no number of replicas"),
        ({"data_parallel_size": 2, "backend": "ray"}, "write backend: native"),
        ({"distributed_timeout_s": 600}, r"distributed_timeout_s: 600 is below ready_timeout_s \(3600\)"),
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


def test_replicas_over_nodes_report_at_a_free_port_of_the_head():
    words = serve(WORKER, data_parallel_size=2, expert_parallel=True, engine_args={})
    assert "--data-parallel-size 2 --enable-expert-parallel " in words
    assert words.endswith("--master-addr 10.0.0.1 --master-port 29501 --data-parallel-rpc-port 29550 --headless")
    assert "rpc-port" not in serve(ALONE, data_parallel_size=2)


def test_replicas_in_engine_args_count_as_those_of_the_setting():
    old = settings.parse(
        {"tensor_parallel_size": 8, "engine_args": {"data_parallel_size": 2, "enable-expert-parallel": True}}
    )
    assert (old.ranks, old.whole_experts) == (16, True)
    command = vllm_commands.serve_command("vllm", "/m", old, HEAD, host="h", port=1, master_port=2, rpc_port=3)
    assert command.count("--data-parallel-size") == command.count("--enable-expert-parallel") == 1


@pytest.mark.parametrize("given", [{"ready_timeout_s": 7200}, {"ready_timeout_s": 60, "distributed_timeout_s": 7200}])
def test_collectives_wait_at_least_as_long_as_the_start(given):
    words = vllm_commands.serve_command(
        "vllm", "/m", settings.parse(given), HEAD, host="h", port=1, master_port=2, rpc_port=3, version=(0, 32, 0)
    )
    for name in ("--distributed-timeout-seconds", "--cpu-distributed-timeout-seconds"):
        assert words[words.index(name) + 1] == "7200"


def test_what_is_compiled_lies_below_the_nodes_folder_unless_the_site_or_the_settings_say_otherwise():
    given = settings.parse({"environment": {"CUDA_CACHE_PATH": "/scratch/cuda"}})
    found = vllm_commands.environment(
        {"HOME": "/home/x", "TRITON_CACHE_DIR": "/site"}, given, ALONE, Path("/tmp/serve-x"), Path("/tmp/kept")
    )
    places = {name: found[name] for name in vllm_commands.CACHES}
    assert places == {
        "VLLM_CACHE_ROOT": "/tmp/kept/vllm",
        "FLASHINFER_WORKSPACE_BASE": "/tmp/kept/flashinfer",
        "TRITON_CACHE_DIR": "/site",
        "CUDA_CACHE_PATH": "/scratch/cuda",
    }


def test_a_folder_of_caches_that_others_could_fill_is_not_used(tmp_path, capfd):
    otherwise, ours = tmp_path / "serve-x", tmp_path / f"deepseek-sft-{os.getuid()}"
    assert caches.folder(otherwise, tmp_path) == caches.folder(otherwise, tmp_path) == ours / "serve"
    assert ours.stat().st_mode & 0o777 == 0o700
    ours.chmod(0o777)
    assert caches.folder(otherwise, tmp_path) == otherwise
    assert "is not ours alone to write" in "".join(capfd.readouterr())
    shutil.rmtree(ours)
    (tmp_path / "elsewhere").mkdir()
    ours.symlink_to(tmp_path / "elsewhere")
    assert caches.folder(otherwise, tmp_path) == otherwise
    assert caches.folder(otherwise, tmp_path / "absent") == otherwise


@pytest.mark.parametrize(
    ("nodes", "sizes", "local"),
    [
        (2, {"data_parallel_size": 16}, 8),  # whole replicas on a node
        (4, {"tensor_parallel_size": 8, "pipeline_parallel_size": 2, "data_parallel_size": 2}, 8),  # 2 nodes for each
        (2, {"tensor_parallel_size": 8, "data_parallel_size": 3}, None),  # 12 a node: one and a half
        (3, {"data_parallel_size": 16}, None),
    ],
)
def test_nodes_hold_whole_replicas_or_replicas_whole_nodes(nodes, sizes, local):
    given = settings.parse(sizes)
    assert given.splits(nodes) == (local is not None)
    if local:
        assert given.local_world_size(nodes) == local
    else:
        with pytest.raises(BadInputError, match=r"data_parallel_size \d+ = \d+"):
            given.local_world_size(nodes)


def test_ranks_must_spread_evenly_over_the_nodes():
    assert SETTINGS.local_world_size(4) == 4
    with pytest.raises(BadInputError, match="16 processes do not spread evenly over 3 nodes"):
        SETTINGS.local_world_size(3)
