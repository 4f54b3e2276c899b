"""Where members are made: pods of a cluster, or processes of this machine."""
