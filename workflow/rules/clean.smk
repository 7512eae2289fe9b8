localrules:
    clean,


# Named on the command line only; a dry run shows what would go. Refuses unless the converted model of the run's last checkpoint is verified.
rule clean:
    log:
        log_file("clean"),
    params:
        preview=what_clean_removes,
    message:
        "Removing all checkpoints of the verified run but the newest\n{params.preview}"
    shell:
        f"{SCRIPT}/clean.py {RESULTS} --free 2>&1 | tee {{log}}"
