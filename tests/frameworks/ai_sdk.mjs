// Asks with the Vercel AI SDK: node ai_sdk.mjs MODE BASE_URL NUMBER...; prints the answers as one line of JSON.
// MICROBATCH_NODE_MODULES names the folder whose node_modules holds the packages.
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const require = createRequire(`${process.env.MICROBATCH_NODE_MODULES}/package.json`);
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const { generateObject, generateText, streamObject, streamText, tool } = await load('ai');
const { createOpenAICompatible } = await load('@ai-sdk/openai-compatible');
const { createOpenAI } = await load('@ai-sdk/openai');
const { z } = await load('zod');

globalThis.AI_SDK_LOG_WARNINGS = false;

const City = z.object({
  name: z.string().describe('Its usual name.'),
  size: z.enum(['small', 'large']),
  population: z.number().int(),
  twins: z.array(z.string()),
  mayor: z.string().nullable(),
});
const [mode, baseURL, ...numbers] = process.argv.slice(2);
const NAME = 'gpt-4.1-mini';
const IN_WORDS = 'Answer in JSON with name, size, population, twins and mayor.';
const apiKey = 'sk-of-these-tests';
const compatible = (structured) =>
  createOpenAICompatible({ name: 'gateway', baseURL, apiKey, includeUsage: true, supportsStructuredOutputs: structured })(NAME);
const openai = () => createOpenAI({ baseURL, apiKey }).chat(NAME);
const asked = (model, number) => ({
  model,
  system: 'You are a geographer.',
  prompt: `Which city has number ${number}?`,
  maxRetries: 0,
});

async function text(stream) {
  let all = '';
  for await (const piece of stream.textStream) all += piece;
  if (!(await stream.usage).totalTokens) throw new Error('no usage');
  return all;
}

const tools = { City: tool({ description: 'A city of the list.', inputSchema: City }) };
const NAMED = { type: 'tool', toolName: 'City' };

async function call(model, number, toolChoice) {
  const result = await generateText({ ...asked(model, number), tools, toolChoice });
  return result.toolCalls[0].input;
}

async function streamedCall(model, number, toolChoice) {
  const stream = streamText({ ...asked(model, number), tools, toolChoice });
  await stream.consumeStream();
  return (await stream.toolCalls)[0].input;
}

const MODES = {
  'generateText': async (number) => (await generateText(asked(compatible(true), number))).text,
  'streamText': async (number) => text(streamText(asked(compatible(true), number))),
  'generateObject': async (number) => (await generateObject({ ...asked(compatible(true), number), schema: City })).object,
  'generateObject, json_object': async (number) =>
    // This provider then sends no schema: programs say it in their own words.
    (await generateObject({ ...asked(compatible(false), number), system: IN_WORDS, schema: City })).object,
  'generateObject, openai': async (number) => (await generateObject({ ...asked(openai(), number), schema: City })).object,
  'streamObject': async (number) => {
    const stream = streamObject({ ...asked(compatible(true), number), schema: City });
    for await (const _ of stream.partialObjectStream);
    return stream.object;
  },
  'streamText, openai': async (number) => text(streamText(asked(openai(), number))),
  'tools, named': async (number) => call(compatible(true), number, NAMED),
  'tools, required': async (number) => call(openai(), number, 'required'),
  'streamText, tools, named': async (number) => streamedCall(compatible(true), number, NAMED),
  'streamText, tools, required': async (number) => streamedCall(openai(), number, 'required'),
};

console.log(JSON.stringify(await Promise.all(numbers.map(MODES[mode]))));
