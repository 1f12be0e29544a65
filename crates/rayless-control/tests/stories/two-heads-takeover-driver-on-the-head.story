# The driver is a client of the daemon that was the head, and hears that it is gone. Nobody asks for the launch any more: what was
# started of it elsewhere ends within seconds, not after the minute for which a keeper waits for its driver.
store lease 3s
node a: 0 GPU, head
node b: 0 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
node d: 8 GPU
within 2s expect node d alive
delay a d 300ms
launch g from a: 16 x {GPU:1}
wait 350ms
expect keepers c: 1
expect keepers d: 1
kill daemon a
within 5s expect head b 2
within 6s expect all free
expect group g failed "whoever asked for it did not ask the new head"
