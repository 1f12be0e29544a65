# One worker dies: one cause for all, from the keeper that saw it.
node a: 2 GPU
node b: 2 GPU
wait 1s
launch g from a: 4 x {GPU:1}
within 2s expect group g running
kill worker g 3
within 100ms expect g failed "rank 3 on node b was killed by signal 9"
within 1s expect group g failed "rank 3 on node b was killed by signal 9"
within 1s expect all free
