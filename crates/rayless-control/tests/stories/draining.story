# Memory of a GPU is not back after its group ended: nobody is placed on it until it is.
node a: 2 GPU
wait 1s
launch g from a: 2 x {GPU:1}
within 1s expect group g running
drain a 1
stop g
within 1s expect group g stopped
within 1s expect gpu a 1 draining
expect gpu a 0 free
launch h from a: 2 x {GPU:1}
within 1s expect h waiting "needs 2 GPUs, 1 of 2 are free"
expect h holder a 1 "memory not free yet"
drained a 1
within 1s expect h placed a:0-1
