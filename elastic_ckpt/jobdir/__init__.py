"""The control directory ``.elastic-ckpt/`` of a job: its paths, small files and logs."""
