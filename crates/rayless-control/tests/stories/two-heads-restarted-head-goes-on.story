# The head's daemon is restarted by its supervisor: it need not wait for its own old lease, and the standby stays one.
store lease 10s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
within 2s expect standby b
launch g from c: 16 x {GPU:1}
within 3s expect group g running
restart daemon a
within 1s expect head a 2
within 2s expect node c alive
within 2s expect group g running
stop g
within 2s expect all free
