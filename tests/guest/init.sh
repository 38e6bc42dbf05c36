#!/usr/bin/busybox sh
# The first program of the guest: what every Linux has mounted, the modules, the network of QEMU's
# own (the host is 10.0.2.2), and then the agent, which stays. When it ends the machine stops.
export PATH=/usr/bin:/usr/sbin:/busybox HOME=/root LC_ALL=C.UTF-8
/usr/bin/busybox --install -s /busybox
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
for module in /modules/*.ko; do
    insmod "$module" || echo "init: no $module"
done
ifconfig lo 127.0.0.1 up
ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
exec python3 -I -S /agent.py
