# `rayless stop --group` and `--all`, from any node; the answer comes when all is reaped. Who waits is told.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from a: 16 x {GPU:1}
within 2s expect group g running
launch w from b: 4 x {GPU:1}
within 1s expect w waiting
end g at b
within 1s expect answer end g "done"
expect group g stopped
within 1s expect w placed
launch x from b: 16 x {GPU:1}
reserve pg from a: 1 x {GPU:2}
within 1s expect x waiting
end all at a
within 1s expect answer end all "done"
expect x refused "stopped by `rayless stop --all`"
expect placement groups: 0
expect all free
