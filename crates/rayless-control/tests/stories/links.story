# Links between ranks: what both ends tell is one entry, a closed link is forgotten, and what is open is told again to a new
# daemon, a new head, and never once its group is over.
node a: 2 GPU
node b: 2 GPU
wait 1s
launch g from a: 4 x {GPU:1}
within 2s expect group g running
expect g placed a:0-1 b:2-3
link g 0 1 shm
link g 0 2 tcp
link g 1 3 rdma
within 1s expect links g: 0->1:shm 0->2:tcp 1->3:rdma
unlink g 0 2
within 1s expect links g: 0->1:shm 1->3:rdma
# The daemon of one end is killed; while it is away links change.
kill daemon b
within 4s expect node b dead
link g 0 2 tcp
within 1s expect links g: 0->1:shm 0->2:tcp 1->3:rdma
unlink g 1 3
start b
within 1s expect node b alive
within 1s expect links g: 0->1:shm 0->2:tcp
# The head is killed and remembers nothing.
kill daemon a
lose head state
wait 5s
start a
within 2s expect node b alive
within 1s expect links g: 0->1:shm 0->2:tcp
# A second group's links are its own, and end with it.
stop g
within 1s expect links g:
launch h from a: 4 x {GPU:1}
within 2s expect group h running
expect links h:
link h 0 3 tcp
within 1s expect links h: 0->3:tcp
kill worker h 3
within 2s expect group h failed
within 1s expect links h:
