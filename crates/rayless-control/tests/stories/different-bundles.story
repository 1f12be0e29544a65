# Bundles of one group need not be equal; other resources than GPUs count, too.
node a: 4 GPU, 16 CPU, 1 disk
node b: 8 GPU, 16 CPU
wait 1s
launch g from a: 1 x {CPU:8, disk:1} + 1 x {GPU:8} + 1 x {GPU:4, CPU:8}
within 1s expect g placed a:0 b:1 a:2
launch h from b: 1 x {disk:1}
within 1s expect h waiting "needs 1 of `disk`, 0 of 1 is free"
launch i from b: 1 x {floppy:1} wait 5s
within 1s expect i waiting "needs 1 of `floppy`, the 2 nodes have 0"
stop g
within 1s expect h placed a:0
