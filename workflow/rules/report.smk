localrules:
    build_report,


rule build_report:
    input:
        [receipt(rule) for rule in CHAIN],
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
