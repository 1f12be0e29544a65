# A large launch waits; small ones that came later do not take what it waits for, even if they would fit.
# One that needs something else passes, and so does anyone behind a launch that could never run here.
node a: 8 GPU, 8 CPU
node b: 8 GPU, 8 CPU
wait 1s
launch never from a: 99 x {GPU:1}
launch hold from a: 8 x {GPU:1}
within 1s expect hold placed a:0-7
launch large from a: 16 x {GPU:1}
within 1s expect large waiting "needs 16 GPUs, 8 of 16 are free"
launch small from b: 1 x {GPU:1}
within 1s expect small waiting "waits for an earlier launch to be placed first"
launch cpu from b: 4 x {CPU:1}
within 1s expect cpu placed b:0-3
stop hold
within 1s expect large placed a:0-7 b:8-15
expect small waiting
stop large
within 1s expect small placed
expect never waiting "needs 99 GPUs, the 2 nodes have 16"
