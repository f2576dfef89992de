"""The table of contents: a short file per stage. Their order and inputs stand in `pipeline/orchestration/graph.py`.

To add a stage `my-stage`: `pipeline/config/my_stage.py` with its config class, a field for it in `PipelineConfig`, a
line in the graph, a file here whose last line is `run_stage("my-stage", main)`, a test. Command, Slurm job, status,
report and tracking follow from the graph. CONTRIBUTING.md has each step.
"""
