"""Write the report of an experiment: a single HTML file made from its receipts, metrics and transcript alone.

The file needs no network and no script: it can be mailed, printed and read on a phone. Stages that did not run,
receipts that cannot be read and failed checks are shown as such, with the last lines of the stage's log.

    build_report.py results/demo                  writes results/demo/report.html, no receipt
    build_report.py --summary results/demo        prints a few lines instead, writes nothing
    build_report.py results/A results/B …         compares them on one page, results/comparison.html: figures, losses in
                                                  one plot, the settings that differ; no receipt

The receipt is what target `all` ends with, so only its rule asks for it, and it is written only when every stage is
complete: a report on a failed run must not look like the end of it.

Exit codes: 0 written, whatever the report says of the experiment; 2 nothing to report on at RESULTS, or --receipt for a
chain that is not complete (the page is written all the same).
"""

from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import chain, cli, files, receipts
from deepseek_sft.printable import visible
from deepseek_sft.report import build, collect, compare, overview


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "results", metavar="RESULTS", type=Path, nargs="+", help="folder of the experiment, results/<experiment>"
    )
    parser.add_argument(
        "--output", type=Path, help="the HTML file; RESULTS/report.html, or comparison.html beside the first RESULTS"
    )
    parser.add_argument("--receipt", type=Path, help="receipt to write, for a complete chain alone")
    parser.add_argument("--logs", type=Path, help="folder of the experiment's logs; found beside RESULTS if not given")
    parser.add_argument("--samples", type=int, default=8, help="exchanges with the served model to show")
    parser.add_argument("--summary", action="store_true", help="print a few lines to standard output and write nothing")
    arguments = parser.parse_args()
    if arguments.samples < 0:
        parser.error("--samples must not be negative")
    places = [(results, arguments.logs or collect.default_logs(results)) for results in arguments.results]
    if arguments.summary:
        print(visible("\n\n".join(overview.summary(*place) for place in places)))
        return
    if len(places) > 1:
        if arguments.logs or arguments.receipt:
            parser.error("--logs and --receipt are for one experiment")
        output = arguments.output or places[0][0].resolve().parent / "comparison.html"
        files.require_writable(output)
        files.write_text(output, compare.compare(places))
        cli.say(f"comparison: {output}")
        return
    ((results, logs),) = places
    output = arguments.output or results / "report.html"
    files.require_writable(output, arguments.receipt)
    report = build.build(results, logs, arguments.samples)
    files.write_text(output, report.html)
    cli.say(f"report: {output} ({report.figures['bytes']:,} bytes) · {report.figures['verdict']}")
    if not arguments.receipt:
        return
    chain.check_complete(results)
    receipts.write(
        arguments.receipt,
        "build_report",
        inputs={
            path.stem: receipts.input_entry(path)
            for path in sorted((results / "receipts").glob("*.json"))
            if path.stem != "build_report"
        },
        settings={"samples": arguments.samples},
        result={"report": str(output)},
        figures=report.figures,
    )


if __name__ == "__main__":
    cli.run(main)
