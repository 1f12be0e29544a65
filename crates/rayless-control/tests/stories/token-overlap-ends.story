# An overlap of a stated time ends by itself, also across a restart of the head; a node that cannot put the token on its disk is named,
# and keeps the operator from ending the overlap by hand.
node a: 8 GPU
node b: 8 GPU
wait 1s
disk full b
rotate 60s
within 1s expect token b behind "no space left"
expect said "[token-not-taken] node b cannot take the new token: no space left on device"
cannot finish rotation
wait 20s
disk free b
break b
within 3s expect rotation spread
kill daemon a
wait 5s
start a
within 3s expect node b alive
within 1s expect rotation spread
wait 20s
expect rotation spread
within 15s expect rotation over
within 1s expect tokens b: 2
for 10s expect node b alive
