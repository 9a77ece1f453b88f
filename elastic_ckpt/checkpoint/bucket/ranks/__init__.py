"""How the processes of a machine read a checkpoint in a bucket, and write their part of one."""
