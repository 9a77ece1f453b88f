"""Supervised fine-tuning with ColossalAI, in a Session: it resumes, counts, saves and stops.

elastic-ckpt run --dir ckpt --nproc 2 -- examples/sft_session.py --plugin zero1
"""

import chat

from elastic_ckpt import ElasticSampler, Session


def main() -> None:
    args = chat.arguments(__doc__.splitlines()[0])
    booster, _ = chat.launch(args)
    dataloader = booster.plugin.prepare_dataloader(
        chat.Conversations(args.samples),
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        distributed_sampler_cls=ElasticSampler,
    )
    model = chat.make_model(booster, args.lora)
    steps_per_epoch = len(dataloader) // args.accumulation_steps
    optimizer, lr_scheduler = chat.make_optimizer(booster, model, args.max_epochs * steps_per_epoch)
    model, optimizer, _, dataloader, lr_scheduler = booster.boost(
        model, optimizer, dataloader=dataloader, lr_scheduler=lr_scheduler
    )
    record = chat.Record(args.record)
    with Session(
        args.save_dir,
        booster=booster,
        model=model,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        accumulation_steps=args.accumulation_steps,
        save_interval=args.save_interval,
    ) as session:
        for epoch in session.epochs(args.max_epochs):
            for batch in session.batches(dataloader):
                loss = chat.learn(booster, model, optimizer, batch, args.accumulation_steps)
                record.batch(epoch, batch, loss)
                if session.step_ends:
                    optimizer.step()
                    optimizer.zero_grad()
                    lr_scheduler.step()
                    session.report(loss=loss.item())
    record.end(model)


if __name__ == "__main__":
    main()
