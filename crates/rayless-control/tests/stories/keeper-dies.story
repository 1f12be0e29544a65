# A keeper is killed: its daemon and its driver see it, the rest is torn down.
node a: 2 GPU
node b: 2 GPU
wait 1s
launch g from a: 4 x {GPU:1}
within 2s expect group g running
kill keeper g on b
within 1s expect g failed "the keeper on node b died"
within 1s expect group g failed
within 1s expect all free
