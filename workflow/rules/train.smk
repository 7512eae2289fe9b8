rule train:
    input:
        base=receipt("prepare_model"),
        tokens=receipt("tokenize_data"),
        plan=ancient(receipt("refine_plan")),  # must fit; a new plan re-runs nothing
    output:
        receipt=receipt("train"),
    log:
        log_file("train"),
    benchmark:
        benchmark_file("train")
    retries: 2
    params:
        settings=EXPERIMENT.settings("train"),
    message:
        "Training"
    shell:
        render("train", folder="train") + stage(f"bash {RESULTS}/train/train.sbatch")
