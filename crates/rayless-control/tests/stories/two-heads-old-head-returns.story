# The old head was stopped (SIGSTOP) for a minute. When it goes on it decides nothing: it finds its lease over before it does
# anything else, and joins the new head as a node with all that it holds.
store lease 3s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
within 2s expect node c alive
launch g from c: 16 x {GPU:1}
within 3s expect group g running
pause a
within 5s expect head b 2
within 1s expect node c alive
for 60s expect head b 2
resume a
within 2s expect follows a b
for 10s expect head b 2
expect said "a: no longer the head (term 1)"
# Its own ranks were silent for too long for the driver.
expect g failed
within 10s expect all free
