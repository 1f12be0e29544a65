# The keeper died while its daemon was down: the node comes back without its part, and the group fails with that cause.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from b: 12 x {GPU:1}
within 2s expect group g running
kill daemon a
kill daemon b
kill driver g
within 1s expect keepers b 0
start a
start b
within 3s expect node b alive
within 1s expect group g failed "came back without its part of the group"
within 1s expect all free
