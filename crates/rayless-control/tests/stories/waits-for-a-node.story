# A launch that is larger than the cluster says so at once, again every ten seconds, and starts when
# the missing node joins.
node a: 8 GPU
node b: 8 GPU, off
wait 1s
launch g from a: 16 x {GPU:1} wait 120s
within 1s expect g waiting "needs 16 GPUs, the only node has 8"
expect g told 1 times
wait 10s
expect g told 2 times
wait 10s
expect g told 3 times
start b
within 1s expect g placed a:0-7 b:8-15
