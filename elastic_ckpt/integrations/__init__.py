"""One file for each framework whose loop elastic-ckpt takes part in; none imports another."""
