# Half GPUs share devices, are exact, and leave whole devices whole.
node a: 2 GPU, 8 CPU
wait 1s
launch g from a: 2 x {GPU:0.5, CPU:1}
within 1s expect g placed a:0-1
expect gpus g rank 0: 0
expect gpus g rank 1: 0
launch h from a: 1 x {GPU:1}
within 1s expect h placed a:0
expect gpus h rank 0: 1
launch i from a: 1 x {GPU:0.1}
within 1s expect i waiting "needs 0.1 GPUs, 0 of 2 are free"
stop g
within 1s expect i placed a:0
expect free a: 0.9 GPU
stop h
stop i
within 1s expect all free
