# `--wait 0` refuses at once, with the table.
node a: 4 GPU
wait 1s
launch g from a: 8 x {GPU:1} wait 0s
within 100ms expect g refused "Resources: needs 8 GPUs, the only node has 4"
launch h from a: 3 x {GPU:1}
within 1s expect h placed
launch i from a: 3 x {GPU:1} wait 0s
within 100ms expect i refused "1 of 4 are free"
expect i holder a 1 "h"
expect i refused "hint: `rayless status`"
