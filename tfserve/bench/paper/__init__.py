"""`tfserve bench paper`: the experiments of the TokenFlow paper in virtual time, on simulated hardware."""
