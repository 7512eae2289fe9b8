"""Program: renders chat templates for ``template_process``, which bounds what it may use. A line of JSON each way.

It is run as a file and imports Jinja alone. A template is a program of whoever made the model folder: it gets a sandbox
without attributes, processor time and memory per rendering, and an end to what it writes.
"""

import datetime
import functools
import json
import resource
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

BEGIN, END = "\U000f5e18", "\U000f5e19"  # around what ``{% generation %}`` marks
DATE = datetime.datetime(2025, 1, 1)  # of ``strftime_now``: the same samples on every day


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what an assistant wrote."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in (BEGIN, END)]
        return jinja2.nodes.Scope([marks[0], *body, marks[1]]).set_lineno(line)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "<<"})  # not computed while a template is compiled

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator != "*" and isinstance(right, int) and abs(right) > 1000:
            raise jinja2.TemplateError(f"{operator} {right} is too large")
        return super().call_binop(context, operator, left, right)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.cache
def compiled(text: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = DATE.strftime
    return environment.from_string(text)


def rendered(request: dict[str, Any]) -> str:
    """What a request asks for; without variables the template is compiled alone."""
    template = compiled(request["text"])
    if "variables" not in request:
        return ""
    parts, left = [], request["most"]
    for part in template.generate(**request["variables"]):
        left -= len(part)
        if left < 0:
            raise jinja2.TemplateError(f"it writes more than {request['most']} characters")
        parts.append(part)
    return "".join(parts)


def main() -> None:
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        bound = int(used.ru_utime + used.ru_stime) + seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (bound, resource.RLIM_INFINITY))
        try:
            answer = {"text": rendered(json.loads(line))}
        except jinja2.TemplateSyntaxError as error:
            answer = {"syntax": str(error)}
        except MemoryError:
            answer = {"error": f"it needs more than {memory >> 20} MiB of memory"}
        except Exception as error:  # whatever a template does to its variables
            answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
