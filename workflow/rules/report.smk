localrules:
    build_report,
    status,
    watch,


rule build_report:
    input:
        [receipt(rule) for rule in stages.CHAIN],
        [receipt("evaluate")] if EXPERIMENT.evaluated() else [],
    output:
        receipt=receipt("build_report"),
    log:
        log_file("build_report"),
    benchmark:
        benchmark_file("build_report")
    message:
        "Writing the report"
    shell:
        script(f"build_report.py {RESULTS} --output {RESULTS}/report.html --receipt {{output.receipt}}")


# Named on the command line only, also while another snakemake runs here: it has neither input nor output to lock.
rule status:
    log:
        log_file("status"),
    message:
        "How far the run is"
    shell:
        f"{SCRIPT}/status.py {RESULTS} --logs {LOGS} 2>&1 | tee {{log}}"


# As status; the address goes to the terminal alone, since a log is read by others.
rule watch:
    log:
        log_file("watch"),
    message:
        "A page on how far the run is"
    shell:
        f"{{{{ {SCRIPT}/watch.py {RESULTS} --logs {LOGS} 2>&1 1>&3 | tee {{log}} >&2; }}}} 3>&1"
