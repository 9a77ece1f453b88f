"""Preference optimization (DPO) with ColossalAI, in a loop of ColossalChat's shape.

    elastic-ckpt run --dir ckpt --nproc 2 -- examples/dpo.py --plugin zero2

Like ``sft.py``, with a frozen reference model, which is rebuilt instead of saved.
"""

import chat
from tqdm import tqdm

from elastic_ckpt import (  # (1)
    StatefulDistributedSampler,
    load_checkpoint,
    save_checkpoint,
    should_save,
)


def main() -> None:
    args = chat.arguments(__doc__.splitlines()[0])
    booster, coordinator = chat.launch(args)
    dataloader = booster.plugin.prepare_dataloader(
        chat.Conversations(args.samples),
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        distributed_sampler_cls=StatefulDistributedSampler,
    )
    model = chat.make_model(booster, args.lora)
    steps_per_epoch = -(-len(dataloader) // args.accumulation_steps)
    optimizer, lr_scheduler = chat.make_optimizer(booster, model, args.max_epochs * steps_per_epoch)
    model, optimizer, _, dataloader, lr_scheduler = booster.boost(
        model, optimizer, dataloader=dataloader, lr_scheduler=lr_scheduler
    )
    reference = chat.make_model(booster).eval().requires_grad_(False).to(chat.device())
    record = chat.Record(args.record)

    start_epoch, step, start_index = load_checkpoint(
        args.save_dir, booster, model, optimizer, lr_scheduler
    )
    dataloader.sampler.set_start_index(start_index)

    for epoch in range(start_epoch, args.max_epochs):
        dataloader.sampler.set_epoch(epoch)
        batches = tqdm(dataloader, desc=f"epoch {epoch}", disable=not coordinator.is_master())
        for i, batch in enumerate(batches, 1):
            loss = chat.preference_loss(model, reference, batch)
            booster.backward(loss / args.accumulation_steps, optimizer)
            record.batch(epoch, batch, loss)
            if i % args.accumulation_steps and i < len(dataloader):
                continue
            optimizer.step()
            optimizer.zero_grad()
            lr_scheduler.step()
            step += 1
            batches.set_postfix(loss=f"{loss.item():.3f}")
            if should_save(step, every=args.save_interval):  # (2)
                save_checkpoint(
                    save_dir=args.save_dir,
                    booster=booster,
                    model=model,
                    optimizer=optimizer,
                    lr_scheduler=lr_scheduler,
                    epoch=epoch,
                    step=step,
                    batch_size=args.batch_size * args.accumulation_steps,
                    coordinator=coordinator,
                )
    record.end(model)


if __name__ == "__main__":
    main()
