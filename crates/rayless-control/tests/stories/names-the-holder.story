# Who waits is told who holds each GPU, and is served when it is given back.
node a: 4 GPU
wait 1s
launch first from a: 3 x {GPU:1}
within 1s expect first placed a:0-2
launch second from a: 2 x {GPU:1}
within 1s expect second waiting "needs 2 GPUs, 1 of 4 are free"
expect second holder a 0 "first"
expect second holder a 2 "first"
stop first
within 1s expect second placed a:0-1
