localrules:
    clean,
    clean_preview,


# Named on the command line only. Both refuse unless the converted model of the run's last checkpoint is verified.
rule clean_preview:
    log:
        log_file("clean_preview"),
    message:
        "Showing which checkpoints `clean` would remove"
    shell:
        f"{SCRIPT}/clean.py {RESULTS} 2>&1 | tee {{log}}"


rule clean:
    log:
        log_file("clean"),
    message:
        "Removing all checkpoints of the verified run but the newest"
    shell:
        f"{SCRIPT}/clean.py {RESULTS} --free 2>&1 | tee {{log}}"
