# A head that is restarted with its state still knows how groups have ended.
node a: 8 GPU
node b: 8 GPU
within 2s expect node b alive
launch g from b: 12 x {GPU:1}
within 2s expect group g running
kill worker g 3
within 2s expect group g failed "was killed by signal 9"
within 2s expect all free
wait 1s
restart daemon a
within 2s expect node b alive
expect group g failed "was killed by signal 9"
expect event group-failed "was killed by signal 9"
# Without any state the nodes tell it.
kill daemon a
lose head state
start a
within 2s expect node b alive
expect group g failed "was killed by signal 9"
