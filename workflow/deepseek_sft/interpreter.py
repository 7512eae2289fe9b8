"""Which Python a script of ours needs, said by the one that cannot run it. Standard library, any Python 3."""

import shlex
import sys

from . import stages

OLDEST = (3, 11)
# Scripts that run in another environment than the workflow's.
ENVIRONMENTS = {
    script: {"serve": "serve-cpu"}.get(stage.environment, stage.environment)
    for stage in stages.ROWS
    for script in stage.scripts or (stage.name,)
    if stage.environment != "workflow"
}
CODE = 2  # docs/exit-codes.md: bad input


def guard():
    """Replace the traceback of a missing package, or of a Python that is too old, by a sentence."""
    if sys.version_info[:2] < OLDEST:
        sys.stderr.write("error: " + advice("is older than 3.11") + "\n")
        sys.exit(CODE)
    before = sys.excepthook

    def hook(kind, error, trace):
        if not isinstance(error, ModuleNotFoundError) or (error.name or "").startswith("deepseek_sft"):
            return before(kind, error, trace)
        sys.stderr.write("error: " + advice("has no " + str(error.name)) + "\n")
        sys.stderr.flush()
        sys.exit(CODE)

    sys.excepthook = hook


def advice(lack):
    """What is wrong with this Python, and the command that uses the right one."""
    path = sys.argv[0]
    name = path.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    environment = ENVIRONMENTS.get(name, "workflow")
    folder = ".envs/" + environment
    again = " ".join(shlex.quote(word) for word in [folder + "/bin/python", path, *sys.argv[1:]])
    version = sys.version.split()[0]
    return (
        f"this Python, {sys.executable} ({version}), {lack}\n"
        f"  fix: use the project's own: source {folder}/bin/activate, or {again}\n"
        f"       (where {folder} is not there yet: python3.11 workflow/scripts/build_env.py {environment})"
    )
