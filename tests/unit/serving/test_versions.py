"""Command lines against the recorded options of several vLLM versions (tests/fixtures/vllm_options)."""

import re
from pathlib import Path

import pytest

from deepseek_sft.errors import BadInputError
from deepseek_sft.serving import settings, versions, vllm_commands

RECORDED = {
    versions.parse(path.stem): set(path.read_text().split())
    for path in (Path(__file__).resolve().parents[2] / "fixtures" / "vllm_options").glob("*.txt")
}
WITHOUT_NATIVE_NODES = sorted(version for version in RECORDED if version < versions.NATIVE_NODES)
HEAD = vllm_commands.Place(0, 2, "10.0.0.1", "ib0", "10.0.0.1")
WORKER = vllm_commands.Place(1, 2, "10.0.0.2", "ib0", "10.0.0.1")
ALONE = vllm_commands.Place(0, 1, "127.0.0.1", "lo", "127.0.0.1")


def options(place: vllm_commands.Place, backend: str, version: versions.Version | None, **engine_args) -> list[str]:
    """Options of the command line, `--no-X` counted as X."""
    given = settings.parse(
        {"backend": backend, "pipeline_parallel_size": 2, "trust_remote_code": True, "engine_args": engine_args}
    )
    words = vllm_commands.serve_command(
        "vllm", "/m", given, place, host="h", port=1, master_port=2, rpc_port=3, version=version
    )
    return [word.removeprefix("--").removeprefix("no-") for word in words if word.startswith("--")]


def test_versions_before_and_after_each_change_are_recorded():
    for change in (versions.PARSER_IMPLIES_REASONING, versions.ENABLE_LOG_REQUESTS, versions.NATIVE_NODES):
        assert min(RECORDED) < change <= max(RECORDED)
    assert max(RECORDED) == (0, 33, 0)


@pytest.mark.parametrize("version", sorted(RECORDED))
@pytest.mark.parametrize("place", [ALONE, HEAD])
@pytest.mark.parametrize("logged", [True, False])
def test_every_option_exists_in_every_version_through_ray(version, place, logged):
    given = options(place, "ray", version, **{"enable-log-requests": logged, "enable-reasoning": True})
    assert set(given) <= RECORDED[version]
    assert options(place, "ray", version, **{"disable-log-requests": not logged}) == options(
        place, "ray", version, **{"enable-log-requests": logged}
    )


@pytest.mark.parametrize("version", sorted(set(RECORDED) - set(WITHOUT_NATIVE_NODES)))
@pytest.mark.parametrize("place", [ALONE, HEAD, WORKER])
def test_every_option_exists_in_every_version_that_spans_nodes_by_itself(version, place):
    assert set(options(place, "native", version)) <= RECORDED[version]


@pytest.mark.parametrize("version", WITHOUT_NATIVE_NODES)
def test_versions_without_native_nodes_say_so_and_serve_one_node(version):
    assert "nnodes" not in RECORDED[version]
    assert set(options(ALONE, "native", version)) <= RECORDED[version]
    with pytest.raises(BadInputError, match=r"no multi-node mode of its own \(it came with 0\.11\.1\)") as raised:
        options(HEAD, "native", version)
    assert "serve.backend: ray" in raised.value.fix


def test_replicas_over_nodes_want_a_version_whose_source_was_read():
    given = settings.parse({"data_parallel_size": 2})
    older = [version for version in RECORDED if versions.NATIVE_NODES <= version < versions.REPLICAS_OVER_NODES]
    assert older
    for version in older:
        with pytest.raises(BadInputError, match="does not place data-parallel replicas over nodes"):
            vllm_commands.serve_command(
                "vllm", "/m", given, HEAD, host="h", port=1, master_port=2, rpc_port=3, version=version
            )


def test_reasoning_is_switched_on_where_the_parser_alone_does_not():
    assert "enable-reasoning" in options(ALONE, "native", (0, 8, 5))
    for version in ((0, 9, 0), (0, 32, 0), None):
        assert "enable-reasoning" not in options(ALONE, "native", version, **{"enable-reasoning": True})


def test_request_log_is_switched_off_by_the_name_of_the_version():
    wanted = {"disable-log-requests": True}
    assert "disable-log-requests" in options(ALONE, "native", (0, 10, 0), **wanted)
    assert "enable-log-requests" in options(ALONE, "native", (0, 10, 1), **wanted)  # as --no-enable-log-requests
    assert not any(re.search("log-requests", name) for name in options(ALONE, "native", (0, 32, 0)))


@pytest.mark.parametrize(
    ("text", "version"),
    [("0.32.0+cpu", (0, 32, 0)), ("0.11.1rc2", (0, 11, 1)), ("0.1.dev12+g3f1", None), ("unknown", None)],
)
def test_version_texts(text, version):
    assert versions.parse(text) == version
