# What makes no sense is refused as such, with a hint.
node a: 4 GPU
wait 1s
launch g from a: 1 x {GPU:1.5}
within 1s expect g refused "Invalid: a bundle asks for 1.5 GPUs (hint: more than one GPU must be a whole number)"
launch h from a: 1 x {}
within 1s expect h refused "Invalid: a bundle asks for nothing"
launch i from a: 0 x {GPU:1}
within 1s expect i refused "Invalid: it asks for no bundle at all"
