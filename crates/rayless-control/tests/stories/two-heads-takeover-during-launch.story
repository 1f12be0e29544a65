# The head dies when it has told the nodes to start but not yet the driver. The new head finds keepers that no driver was told of; they
# give up by themselves, and the launch, which its node asks for again, is served by the new head.
store lease 3s
node a: 0 GPU, head
node b: 0 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
node d: 8 GPU
within 2s expect node d alive
mute d
launch g from c: 16 x {GPU:1}
wait 100ms
expect keepers c: 1
expect keepers d: 1
kill daemon a
unmute d
within 5s expect head b 2
expect g asking
within 40s expect g placed
within 5s expect group g running
stop g
within 2s expect all free
