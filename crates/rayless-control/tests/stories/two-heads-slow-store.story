# Answers of the store take longer and longer: a lease whose renewal is not answered in time is not used, and nobody else has it meanwhile.
store lease 3s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
within 2s expect node c alive
launch g from c: 8 x {GPU:1}
within 3s expect group g running
store delay 300ms
for 20s expect head a 1
store delay 900ms
wait 20s
expect g placed
store delay 5ms
within 10s expect node c alive
within 3s expect group g running
stop g
within 3s expect all free
