# Every other message comes twice: nothing is started twice, counted twice or freed twice.
node a: 8 GPU
node b: 8 GPU
duplicates a b 50%
jitter a b 20ms
within 3s expect node b alive
launch g from b: 16 x {GPU:0.5}
within 3s expect group g running
launch h from b: 8 x {GPU:1}
within 3s expect group h running
stop g
kill worker h 2
within 3s expect h failed "rank 2 on node a was killed by signal 9"
within 3s expect all free
