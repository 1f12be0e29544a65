# The main job: two nodes of eight GPUs, one group of sixteen ranks. Ranks are contiguous, rank 0 is
# on the driver's node, and after an orderly stop everything is free again.
node a: 8 GPU
node b: 8 GPU
within 1s expect node b alive
launch g from a: 16 x {GPU:1}
within 1s expect g placed a:0-7 b:8-15
expect gpus g rank 9: 1
within 1s expect group g running
expect free b: 0 GPU
stop g
within 1s expect group g stopped
expect all free
