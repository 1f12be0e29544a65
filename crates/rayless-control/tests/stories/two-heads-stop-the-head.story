# `rayless stop` on the head gives the lease back: the standby does not have to wait for its end.
store lease 10s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
within 2s expect standby b
launch g from c: 8 x {GPU:1}
within 3s expect group g running
leave a
within 500ms expect head b 2
within 4s expect node c alive
expect g placed
stop g
within 2s expect all free
