# Who waits on a node that dies no longer stands in the way of others.
node a: 8 GPU
node b: 8 GPU
node c: 8 GPU
wait 1s
launch hold from a: 4 x {GPU:1}
within 1s expect hold placed
launch large from b: 16 x {GPU:1} STRICT_PACK wait 600s
launch eight from b: 8 x {GPU:1} STRICT_PACK
within 1s expect eight placed b:0-7
launch more from b: 14 x {GPU:1}
within 1s expect more waiting
launch small from a: 8 x {GPU:1}
within 1s expect small waiting
power off b
within 4s expect node b dead
within 1s expect small placed
