"""A driver, GPU or environment that cannot run the torch build is told before training asks for nodes."""

import pytest

from deepseek_sft.preflight import cuda_stack


@pytest.mark.parametrize(
    ("cuda", "driver", "capability", "compatibility", "words"),
    [
        (13, "550.54.15", (9, 0), None, "needs driver 580"),
        (12, "515.1", (9, 0), None, "needs driver 525"),
        (13, "535.1", (9, 0), 570, "cuda_compat brings 570"),
        (13, "[N/A]", (9, 0), None, "cannot be read"),
        (13, "580.65.06", (7, 5), None, "8.0 (Ampere)"),
    ],
)
def test_what_does_not_carry_the_build_is_told(cuda, driver, capability, compatibility, words):
    (problem,) = cuda_stack.problems(cuda, driver, capability, compatibility)
    assert words in problem


@pytest.mark.parametrize(
    "case", [(13, "580.65.06", (9, 0), None), (12, "550.1", (8, 0), None), (13, "535.1", (9, 0), 580)]
)
def test_healthy_node_has_no_problem(case):
    assert cuda_stack.problems(*case) == []


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("from typing import Optional\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", 13),
        ("cuda = '12.6'\n", 12),
        ('cuda: str | None = "13.1"\n', 13),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", 0),
        ("git_version = 'abc'\n", None),
    ],
)
def test_cuda_of_the_build_is_read_from_torch_s_own_words(tmp_path, text, cuda):
    (tmp_path / "version.py").write_text(text)
    assert cuda_stack.built_for(tmp_path) == cuda


def test_a_build_that_does_not_say_its_cuda_is_not_judged_and_one_for_cpus_refused(monkeypatch, tmp_path):
    assert cuda_stack.built_for(tmp_path) is None
    monkeypatch.setattr(cuda_stack, "built_for", lambda: None)
    found = cuda_stack.check("cuda", "580.65.06", ["9.0"], {})
    assert found.passed and "not judged" in found.detail
    monkeypatch.setattr(cuda_stack, "built_for", lambda: 0)
    assert cuda_stack.check("cuda", "580.65.06", ["9.0"], {}).passed is False


def test_compatibility_library_counts_by_its_file_s_version(tmp_path):
    (tmp_path / "libcuda.so.580.65.06").touch()
    (tmp_path / "libcuda.so.1").symlink_to("libcuda.so.580.65.06")
    assert cuda_stack.compatibility_driver(f"/none:{tmp_path}") == 580
    assert cuda_stack.compatibility_driver("") is None


def test_ampere_is_told_what_does_not_work(monkeypatch):
    monkeypatch.setattr(cuda_stack, "built_for", lambda: 13)
    found = cuda_stack.check("cuda", "580.65.06", ["8.0", "9.0"], {})
    assert found.passed and "without grouped products" in found.detail
