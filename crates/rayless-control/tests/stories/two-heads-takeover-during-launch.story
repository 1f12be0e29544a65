# The head dies when it has told the nodes to start but not yet the driver. Their keepers go over to the next head with the request that they were
# started for; it is asked again, and the launch goes on: nothing is started twice, nothing waits for a limit.
store lease 3s
node a: 0 GPU, head
node b: 0 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
node d: 8 GPU
within 2s expect node d alive
delay a d 300ms
launch g from c: 16 x {GPU:1}
wait 350ms
expect keepers c: 1
expect keepers d: 1
kill daemon a
within 5s expect head b 2
within 2s expect g placed c:0-7 d:8-15
within 2s expect group g running
expect keepers c: 1
expect keepers d: 1
stop g
within 2s expect all free
