"""Which backend is right on this very device, and which the fastest: found out here, and remembered.

A compiler, a driver or a chip can make a kernel wrong that is right elsewhere, so ``auto`` takes on a device what has
proved itself there. ``run.verify`` has child processes (``supervisor``, ``checks.worker``) run each route of each
backend on small calls of each kind (``cells``) and compares them with the reference in fp64; then it times those that
were right, by bucket of shape. ``store`` keeps the result, a ``table``, in the cache folder, for this device, driver,
torch, Triton and these sources. ``ranking`` reads it for ``auto``; ``first_use`` verifies what a call or a model needs
and the table does not have.
"""
